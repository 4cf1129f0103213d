"""The identity of a job: a hash of its config, so that a repeated or larger sweep runs only what is missing."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainkit.core.redaction import redact_by_key, redact_copies
from trainkit.runs.secrets import literal_secrets

# Keys that say what is shown and recorded, or how the sweep runs. Any other key may be swept over.
IGNORED_KEYS = {"progress", "report", "logger", "fail_fast", "retries", "search"}


def config_hash(config: DictConfig) -> str:
    """Return the hash of a job's config: 16 hexadecimal digits.

    Interpolations are not resolved, so the hash does not depend on the environment, the time or the job's number.
    Secrets enter it through a slow hash, because the ledger must not help to guess them.

    Args:
        config: without Hydra's node.
    """
    plain: Any = redact_copies(redact_by_key(OmegaConf.to_container(config, resolve=False)), literal_secrets(config))
    kept = {key: value for key, value in plain.items() if key not in IGNORED_KEYS}
    text = json.dumps(kept, sort_keys=True, default=str)
    secrets = sorted(literal_secrets(config))
    text += _slow_hash("\0".join(secrets)) if secrets else ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _slow_hash(text: str) -> str:
    return hashlib.pbkdf2_hmac("sha256", text.encode(), b"trainkit", 200_000).hex()

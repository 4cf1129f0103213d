"""Train straight, train with kills at random steps and resumes, and compare the final states' hashes."""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.paths import claim_directory
from trainkit.display import text as tables


def run(argv: Sequence[str]) -> int:
    """Exit code 0 only if both trainings end with the same bits; the runs are kept where they do not."""
    args, composed = arguments.parse_for_one_config(argv, json=False, kills=3)
    if args.kills < 1:
        raise ConfigError(f"--kills {args.kills}: none to resume from", hint="write --kills 3")
    if composed.settings.checkpoint is None:
        raise ConfigError("checkpoint=off: there is nothing to resume from", hint="leave it out")
    if args.config_dir:
        raise ConfigError("--config-dir: put the configs into ./conf here", hint="leave it out")
    from trainkit.diagnostics.verify_resume import verify

    directory = claim_directory(Path("outputs/verify-resume") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}")
    overrides = [text for text in args.overrides if not text.startswith(("hydra.run.dir=", "progress="))]
    found = verify(overrides, args.kills, directory, lambda line: print(line, file=sys.stderr))
    if "failed" in found:
        return int(found["failed"]) % 256
    print(tables.as_json(found) if args.json else "\n".join(tables.verified(found, directory)))
    if found["equal"]:
        shutil.rmtree(directory)
    return 0 if found["equal"] else 1

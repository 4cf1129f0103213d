"""The fingerprint of a run: the config keys that its numbers depend on, and how two fingerprints differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.settings import Settings
from trainkit.core.leaves import leaves
from trainkit.core.redaction import MIN_SECRET_LENGTH, redact_by_key, redact_copies
from trainkit.runs.secrets import environment_resolver, literal_secrets

# Keys that do not affect results: hardware, logging, and the length of the run.
FREE_KEYS = {
    "epochs",
    "steps",
    "max_minutes",
    "limit_val_batches",
    "early_stop",
    "device",
    "devices",
    "distributed",
    "memory_format",
    "compile",
    "micro_batch",
    "sync_batchnorm",
    "activation_checkpointing",
    "val_batch_size",
    "deterministic",
    "on_oom",
    "on_nonfinite",
    "checkpoint",
    "watch",
    "hooks",
    "metrics",
    "logger",
    "progress",
    "report",
    "fail_fast",
    "retries",
    "search",
    "data.num_workers",
    "data.cache",
    "data.cache_limit",
    "data.on_unreadable",
}
FREE_OPTIONS = {"fused", "foreach"}  # optimizer options that change how a step is computed, not its result
PATH_KEYS = {"root", "file", "folder", "path", "dir", "download"}  # keys in `data` that locate the files


def fingerprint(settings: Settings, *, length: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the dotted keys that the numbers depend on, with their values, without secrets.

    Args:
        settings: the settings of the run.
        length: return the fingerprint of a run with these `epochs` and `steps` instead.
    """
    config = settings.source
    if length is not None:
        config = config.copy()
        config.epochs, config.steps = length["epochs"], length["steps"]
    return {key: value for key, value in redacted_values(config).items() if not _is_free(key)}


def redacted_values(config: DictConfig) -> dict[str, Any]:
    """Return the dotted keys of a config with their resolved values, without secrets."""
    secrets = {text for text in literal_secrets(config) if len(text) >= MIN_SECRET_LENGTH}
    # `${oc.env:NAME}` becomes its own name, so that no value of the environment gets into a file.
    with environment_resolver(lambda name, *_: f"(oc.env:{name})"):
        plain = redact_copies(redact_by_key(_resolved(config, secrets)), secrets)
    return dict(leaves(plain))


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two fingerprints differ, each with both values; a missing key has the value None."""
    keys = dict.fromkeys([*saved, *current])
    return {key: (saved.get(key), current.get(key)) for key in keys if saved.get(key) != current.get(key)}


def is_allowed(key: str, allow: Collection[str]) -> bool:
    """Return whether `allow` contains a key or one of its parents."""
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def _is_free(key: str) -> bool:
    top, last = key.partition(".")[0], key.rpartition(".")[2]
    is_free = (top == "data" and last in PATH_KEYS) or (top == "optim" and last in FREE_OPTIONS)
    return key.startswith("_") or is_allowed(key, FREE_KEYS) or is_free


def _resolved(node: Any, secrets: set[str]) -> Any:
    """Return a config as plain containers. Interpolations that fail or give a secret stay unresolved."""
    if isinstance(node, DictConfig):
        return {str(key): _value(node, key, secrets) for key in node}
    if isinstance(node, ListConfig):
        return [_value(node, index, secrets) for index in range(len(node))]
    return node


def _value(node: Any, key: Any, secrets: set[str]) -> Any:
    try:
        value = _resolved(node[key], secrets)
        hidden = OmegaConf.is_interpolation(node, key) and any(secret in str(value) for secret in secrets)
    except OmegaConfBaseException:
        hidden = True
    return OmegaConf.to_container(node, resolve=False)[key] if hidden else value  # type: ignore[index]

"""What a run's numbers depend on: its config without the machine, and how two of them differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from trainkit.config.settings import Settings
from trainkit.core.redaction import MIN_SECRET_LENGTH, find_secrets, redact_by_key

# Machinery, what is only seen, and when a run ends: none of it changes a number of the epochs that there are.
FREE = {
    "epochs",
    "early_stop",
    "device",
    "memory_format",
    "compile",
    "micro_batch",
    "deterministic",
    "on_oom",
    "on_nonfinite",
    "checkpoint",
    "watch",
    "hooks",
    "progress",
    "data.num_workers",
    "data.cache",
    "data.cache_limit",
    "data.on_unreadable",
}
COMPUTED = {"fused", "foreach"}  # options of optimizers that say how a step is computed
PATHS = {"root", "file", "folder", "path", "dir", "download"}  # keys inside `data` that say where it lies


def fingerprint(settings: Settings, *, epochs: int | None = None) -> dict[str, Any]:
    """The keys of a config that the numbers depend on, dotted, with their values; no secret, no environment.

    With `epochs`, the fingerprint is that of a training of so many epochs.
    """
    config = settings.source
    if epochs is not None:
        config = config.copy()
        config.epochs = epochs
    secrets = {
        text for text in find_secrets(OmegaConf.to_container(config, resolve=False)) if len(text) >= MIN_SECRET_LENGTH
    }
    with _environment_unread():
        plain = redact_by_key(_resolved(config, secrets))
    return {key: value for key, value in _leaves(plain) if not _is_free(key)}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two fingerprints differ, each with both values; a key that one lacks is None there."""
    keys = dict.fromkeys([*there, *here])
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


def allowed(key: str, allow: Collection[str]) -> bool:
    """Whether a key, or one above it, is among those named."""
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def _is_free(key: str) -> bool:
    top, last = key.partition(".")[0], key.rpartition(".")[2]
    inside = (top == "data" and last in PATHS) or (top == "optim" and last in COMPUTED)
    return key.startswith("_") or allowed(key, FREE) or inside


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping with something in it; lists are values."""
    if isinstance(node, Mapping) and (node or not path):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _resolved(node: Any, secrets: set[str]) -> Any:
    """A config as plain containers; what needs the environment or holds a secret then stays as it is written."""
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


@contextmanager
def _environment_unread() -> Iterator[None]:
    """Let `${oc.env:NAME}` be its own name: what is in the environment is for the process, not for files."""
    OmegaConf.register_new_resolver("oc.env", lambda name, *_: f"(oc.env:{name})", replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)

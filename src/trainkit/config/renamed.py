"""Renamed config keys and moved modules: an error for new configs, an upgrade for the configs of saved runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from trainkit.config.search_path import CONF
from trainkit.core.errors import Problem
from trainkit.core.moved import MOVED_MODULES

RENAMED_KEYS = {
    "data.on_error": "data.on_unreadable",
    "data.augment.crop": "data.augment.crop_padding",
}
ON_BEFORE = {"data.shuffle": True}  # keys that older versions did not have, and that are not off
RENAMED_VALUES = {"data.cache_limit": "auto"}  # key -> the value that was written as off


def renamed_problem(key: str, written: str, value: str = "VALUE") -> Problem | None:
    """Return the problem of a config that uses the old name of a key; None for other keys.

    Args:
        key: the key, dotted.
        written: the key or override as the user wrote it.
        value: the value that the user wrote.
    """
    if key not in RENAMED_KEYS:
        return None
    return Problem(f"{written}: the key {key} is now {RENAMED_KEYS[key]}", f"write {RENAMED_KEYS[key]}={value}")


def upgrade_saved_config(config: DictConfig) -> None:
    """Replace old names of keys, values and modules in the config of a saved run, and add new keys, in place."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    for old, new in RENAMED_KEYS.items():
        *above, leaf = old.split(".")
        node = plain
        for key in above:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and leaf in node:
            node[new.rpartition(".")[2]] = node.pop(leaf)
    for key, value in RENAMED_VALUES.items():
        section, _, leaf = key.partition(".")
        node = plain.get(section)
        if isinstance(node, dict) and node.get(leaf, value) in (None, False, "off"):
            node[leaf] = value
    _add_new_keys(plain, yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8")))
    _upgrade_targets(plain)
    OmegaConf.set_struct(config, False)
    for key, value in plain.items():
        config[key] = value


def upgrade_fingerprint(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved fingerprint, config values by dotted key, with old key and module names replaced.

    So a run that an older version saved can be compared and resumed.
    """
    return ON_BEFORE | {  # any other missing key counts as off
        RENAMED_KEYS.get(key, key): current_target(value) if key.endswith("_target_") else value
        for key, value in fingerprint.items()
    }


def current_target(dotted: Any) -> Any:
    """Return the current dotted path of an object, if its module has moved."""
    for old, new in MOVED_MODULES.items():
        if isinstance(dotted, str) and dotted.startswith(f"{old}."):
            return new + dotted.removeprefix(old)
    return dotted


def _add_new_keys(saved: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Add the keys that an older version did not have, with the values of config.yaml, in place."""
    for key, value in defaults.items():
        if key in ("defaults", "hydra") or value == "???":
            continue
        if isinstance(value, dict) and isinstance(saved.get(key), dict):
            _add_new_keys(saved[key], value)
        else:
            saved.setdefault(key, value)


def _upgrade_targets(node: Any) -> None:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _upgrade_targets(value)
    if isinstance(node, dict) and "_target_" in node:
        node["_target_"] = current_target(node["_target_"])

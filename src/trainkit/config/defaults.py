"""What a config changes: its differences from the shipped configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from trainkit.config.compose import compose
from trainkit.config.schema import RootKeys
from trainkit.config.search_path import CONF
from trainkit.core.errors import ConfigError
from trainkit.core.leaves import leaves

ABSENT = "(absent)"
PLAIN_NAME = re.compile(r"[\w.-]+")  # a choice that is safe to compose, whoever wrote it


def differences(
    config: Mapping[str, Any], choices: Mapping[str, str], config_dir: str | None = None
) -> tuple[str, list[tuple[str, str, str]]]:
    """Return what a saved config was compared with, and the key, default and value of each difference.

    Interpolations are compared as they are written.

    Args:
        config: the dotted keys of a run's config with their values.
        choices: the choices of Hydra's groups, such as `{"optim": "adam"}`. They are composed too, except the
            experiment: what it changes is a difference. If they cannot be composed, the default choices are compared.
        config_dir: a folder of configs besides ./conf.
    """
    defaults = default_choices()
    chosen = {
        group: choices[group]
        for group in defaults
        if group in choices and group != "experiment" and PLAIN_NAME.fullmatch(choices[group])
    }
    base, shipped = (
        "the defaults of its choices",
        _composed([f"{group}={name}" for group, name in chosen.items()], config_dir),
    )
    if shipped is None:
        base, shipped = "the default config", _composed([], config_dir) or {}
    rows = [(group, defaults[group], choices[group]) for group in defaults if group in choices]
    changed = [row for row in rows if row[1] != row[2]]
    default = dict(leaves(shipped))
    for key in dict.fromkeys([*default, *config]):
        one, other = default.get(key, ABSENT), config.get(key, ABSENT)
        is_newer = key in RootKeys.__annotations__ and key not in config  # than the run
        if one != other and not is_newer:
            changed.append((key, _shown(one), _shown(other)))
    return base, changed


def default_choices() -> dict[str, str]:
    """Return the groups of the config with their default choices."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    found = {key: str(name) for entry in entries if isinstance(entry, dict) for key, name in entry.items()}
    return {group: name for group, name in found.items() if "/" not in group}


def _composed(overrides: list[str], config_dir: str | None) -> Any:
    """Return a composed config as plain containers; None if it cannot be composed."""
    before = HydraConfig.instance().cfg
    try:
        return OmegaConf.to_container(compose(overrides, config_dir), resolve=False)
    except ConfigError:
        return None
    finally:
        HydraConfig.instance().cfg = before  # composing sets it, and a job of a sweep reads it


def _shown(value: Any) -> str:
    return "off" if value is None else str(value)

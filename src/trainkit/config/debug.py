"""The config group `debug`: which overrides contradict the chosen way to debug."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainkit.config.search_path import CONF
from trainkit.core.errors import Problem
from trainkit.core.leaves import leaves

NONE = "none"
ADJUSTABLE = ("steps", "hooks.debug")  # keys that a command line may set besides `debug`


def find_debug_contradictions(choices: Mapping[str, Any], overrides: Iterable[str]) -> Iterator[Problem]:
    """Yield overrides of keys that the chosen way to debug sets.

    The choice of a group such as `data` is no contradiction if debug sets single keys of its section.

    Args:
        choices: group -> choice.
        overrides: `KEY=VALUE`.
    """
    choice = choices.get("debug", NONE)
    file = CONF / "debug" / f"{choice}.yaml"
    if choice == NONE or not file.is_file():
        return
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    groups = [str(next(iter(node))).removeprefix("override /") for node in content.pop("defaults", [])]
    keys = [key for key, _ in leaves(content)]
    for text in overrides:
        for key in _keys_of(text):
            is_set = key in groups or key in keys
            is_set |= key not in choices and any(name.startswith(f"{key}.") for name in keys)
            if is_set and not key.startswith(ADJUSTABLE):
                yield Problem(f"{text}: debug={choice} sets {key}", f"remove {text}, or debug={choice}")


def _keys_of(text: str) -> list[str]:
    """Return the keys that an override sets: with a mapping as the value, those of its leaves."""
    key = text.lstrip("+~").partition("=")[0]
    try:
        value = OverridesParser.create().parse_override(text).value()
    except HydraException:  # it is reported as such
        return [key]
    return [name for name, _ in leaves(value, key)] if isinstance(value, dict) else [key]

"""The config group `debug`: which overrides contradict the chosen way to debug."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from trainkit.config.search_path import CONF
from trainkit.core.errors import Problem
from trainkit.core.leaves import leaves

NONE = "none"
ADJUSTABLE = ("steps", "hooks.debug")  # keys that a command line may set besides `debug`


def find_debug_contradictions(choice: Any, overrides: Iterable[str]) -> Iterator[Problem]:
    """Yield overrides of keys that the chosen way to debug sets.

    Args:
        choice: of the group `debug`.
        overrides: `KEY=VALUE`.
    """
    file = CONF / "debug" / f"{choice}.yaml"
    if choice == NONE or not file.is_file():
        return
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    groups = [str(next(iter(node))).removeprefix("override /") for node in content.pop("defaults", [])]
    keys = [*(key for key, _ in leaves(content)), *groups]
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        is_set = any(name == key or name.startswith(f"{key}.") for name in keys)
        if is_set and not key.startswith(ADJUSTABLE):
            yield Problem(f"{text}: debug={choice} sets {key}", f"remove {text}, or debug={choice}")

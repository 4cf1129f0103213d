"""The section `init_from`: its short form, and its checks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig

from trainkit.config.hints import is_off
from trainkit.config.schema import SHORT_FORMS
from trainkit.config.search_path import CONF
from trainkit.core.errors import Problem


def expand_short_forms(config: DictConfig) -> None:
    """Replace `init_from: PATH` in a config by the section with this path, in place."""
    for section, key in SHORT_FORMS.items():
        value = config.get(section)
        if isinstance(value, str) and not is_off(value):
            defaults = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))[section]
            config[section] = {**defaults, key: value}


def expand_short_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with `init_from.path=X` for `init_from=X` if other overrides set keys of the section."""
    expanded = list(overrides)
    for section, key in SHORT_FORMS.items():
        if not any(text.lstrip("+").startswith(f"{section}.") for text in overrides):
            continue
        for number, text in enumerate(expanded):
            name, _, value = text.partition("=")
            if name == section and not value.startswith("{") and value not in ("off", "false", "null"):
                expanded[number] = f"{section}.{key}={value}"
    return expanded


def find_wrong_init_from(section: Any) -> Iterator[Problem]:
    """Yield a problem for patterns without a path, and for each pattern that is not a regular expression."""
    if not isinstance(section, Mapping):
        return
    if section.get("path") == "":
        yield Problem("init_from: the path is empty", "write init_from=PATH, or init_from=off")
    for key in ("missing", "unexpected"):
        patterns = section.get(key)
        if not isinstance(patterns, list):
            continue
        if patterns and is_off(section.get("path")):
            yield Problem(f"init_from.{key}: there are no weights to start from", "write init_from.path=PATH")
        for pattern in patterns:
            try:
                re.compile(str(pattern))
            except re.error as error:
                cause = f"init_from.{key}: {pattern!r} is not a valid regular expression ({error})"
                yield Problem(cause, "write .* for any characters, \\. for a dot")

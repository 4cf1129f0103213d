"""Read the type hints of the schema's dataclasses."""

from __future__ import annotations

import functools
import keyword
import types
import typing
from dataclasses import is_dataclass
from typing import Annotated, Any

from trainkit.config.schema import OneOrNamed, RootKeys


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """Return the type hint of each key of a dataclass; see `field_name`."""
    return {name.removesuffix("_"): hint for name, hint in typing.get_type_hints(schema, include_extras=True).items()}


def field_name(key: str) -> str:
    """Return the field of a key: `async_` for `async`, because Python reserves this word."""
    return f"{key}_" if keyword.iskeyword(key) else key


def options_of(hint: Any) -> list[Any]:
    """Return the alternatives of a type hint; None among them is `NoneType`."""
    if is_one_or_named(hint):
        return [dict, type(None)] if hint.__metadata__[0].optional else [dict]
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # `Annotated | None` gives a typing.Union
    return list(typing.get_args(hint)) if union else [hint]


def can_be_off(hint: Any) -> bool:
    """Return whether a key accepts off."""
    return type(None) in options_of(hint)


def dataclass_of(hint: Any) -> type | None:
    """Return the dataclass among the alternatives of a type hint, if there is one."""
    return next((option for option in options_of(hint) if isinstance(option, type) and is_dataclass(option)), None)


def keys_of_sections() -> dict[str, set[str]]:
    """Return the keys that the schema allows in each section, by the section's path. The root's path is empty."""
    sections: dict[str, set[str]] = {}

    def walk(schema: type, path: str) -> None:
        sections[path] = set(hints_of(schema))
        for key, hint in hints_of(schema).items():
            inner = dataclass_of(hint)
            if inner is not None:
                walk(inner, f"{path}.{key}".lstrip("."))

    walk(RootKeys, "")
    return sections


def is_one_or_named(hint: Any) -> bool:
    """Return whether a key holds one node or several named nodes."""
    return typing.get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], OneOrNamed)


def is_off(value: Any) -> bool:
    """Return whether a value is one of the ways to write off."""
    return value is None or value is False or value == "off"

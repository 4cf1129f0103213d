"""Complete overrides: the names of groups and keys, and their values."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

from trainkit.config.choices import find_groups, find_names
from trainkit.config.hints import can_be_off, dataclass_of, hints_of, options_of
from trainkit.config.schema import COLLATES, METRICS, SAMPLERS, SUPERVISED, Pattern, RootKeys

SHORT_NAMES = {
    "data.sampler": SAMPLERS,
    "data.collate": tuple(COLLATES),
    "monitor.metric": METRICS,
    "training_step": (SUPERVISED,),
    "evaluation_step": (SUPERVISED,),
}
PREFIXES = ("++", "+", "~")  # of a key in an override


def key_candidates(current: str, before: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the groups and keys of an override without a value. Keys end with `=`, mappings with a dot.

    Args:
        current: the beginning of the override.
        before: the overrides before it.
        config_dir: a folder of configs besides ./conf.
    """
    prefix = next((prefix for prefix in PREFIXES if current.startswith(prefix)), "")
    end = "" if prefix == "~" else "="
    names = key_names(current.removeprefix(prefix), before, config_dir)
    found = [name if name.endswith(".") else f"{name}{end}" for name in names]
    if "." not in current and prefix != "+":
        found += [f"{group}{end}" for group in find_groups(config_dir)]
    return [f"{prefix}{name}" for name in sorted(set(found))]


def key_names(current: str, before: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the keys at the level of a dotted key. Mappings end with a dot."""
    parent, dot, _ = current.rpartition(".")
    if not dot:
        hints = hints_of(RootKeys)
        mappings = [f"{key}." for key, hint in hints.items() if any(map(_is_mapping, options_of(hint)))]
        return [
            *mappings,
            *(key for key, hint in hints.items() if not all(map(_is_mapping, options_of(hint)))),
            "hydra.",
        ]
    node = _node(parent, before, config_dir)
    return [f"{parent}.{key}" + "." * isinstance(value, dict) for key, value in _items(node)]


def value_candidates(key: str, before: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the values of a key, without `KEY=`: the choices of a group, an enumeration, or the present value.

    Args:
        key: a group, or a dotted key.
        before: the overrides before this one.
        config_dir: a folder of configs besides ./conf.
    """
    name = key.lstrip("+~")
    if name in find_groups(config_dir):
        return find_names(name, config_dir)
    hint: Any = RootKeys
    for part in name.split("."):
        inner = hint if hint is RootKeys else dataclass_of(hint)
        hint = hints_of(inner).get(part) if inner is not None else None
        if hint is None:
            break
    values = list(SHORT_NAMES.get(name, ())) + (_enumeration(hint) if hint is not None else [])
    if hint is not None and can_be_off(hint) and name != "lr":
        values.append("off")
    if not any(value != "off" for value in values):
        values = [*_present(name, before, config_dir), *values]
    return list(dict.fromkeys(values))


def _enumeration(hint: Any) -> list[str]:
    """Return the words that a type allows."""
    words: list[str] = []
    for option in options_of(hint):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            words += ["true" if arg is True else str(arg) for arg in args]
        elif option is bool:
            words += ["true", "false"]
        elif origin is Annotated and isinstance(args[1], Pattern):
            words += [part.partition("(")[0] for part in args[1].regex.split("|")]
    return words


def _present(key: str, before: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the present value of a key; both values of a boolean."""
    parent, _, leaf = key.rpartition(".")
    node = _node(parent, before, config_dir)
    value = next((item for name, item in _items(node) if name == leaf), None)
    if isinstance(value, bool):
        return ["true", "false"]
    return [str(value)] if isinstance(value, str | int | float) and value != "???" else []


def _is_mapping(option: Any) -> bool:
    return is_dataclass(option) or dict in (option, typing.get_origin(option))


def _items(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, list):
        return []
    return [(str(key), value) for key, value in node.items()] if isinstance(node, dict) else []


def _node(path: str, before: Sequence[str], config_dir: str | None) -> Any:
    """Return the part of the composed config at a dotted key, as plain containers."""
    from trainkit.config.partial import compose_partly

    node: Any = compose_partly(before, config_dir)
    for key in path.split(".") if path else ():
        node = node.get(key) if isinstance(node, dict) else None
    return node

"""A JSON schema of config files, with which an editor completes and checks keys."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from trainkit.config.comments import key_comments
from trainkit.config.hints import can_be_off, dataclass_of, hints_of, options_of
from trainkit.config.schema import SHORT_FORMS, Pattern, Range, RootKeys
from trainkit.config.search_path import CONF, user_folders

DEFINITIONS = {
    "off": {"enum": ["off", False, None]},
    "interpolation": {
        "description": "an interpolation such as ${lr}, or ??? for a value that must be given",
        "type": "string",
        "pattern": r"\$\{|^\?\?\?$",
    },
}
OUTSIDE = {  # root keys that Hydra reads
    "defaults": {"description": "the configs that this config is composed of", "type": "array"},
    "hydra": {"description": "settings of Hydra", "type": "object"},
}
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def json_schema(folders: Sequence[Path] | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of config.yaml and of experiments. No key is required.

    Its definition `data` is the schema of a data/*.yaml, which may add keys.

    Args:
        folders: the folders of configs whose data sets add keys; None: the shipped ones and ./conf.
    """
    descriptions = {key: comment.text for key, comment in key_comments().items()}
    schema = _object(RootKeys, "", descriptions)
    schema["properties"] |= OUTSIDE
    data = schema["properties"]["data"]["anyOf"][0]
    data["properties"] |= _data_set_keys(folders or [CONF, *user_folders()])
    definitions = {**DEFINITIONS, "data": {**data, "additionalProperties": True}}
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "title": "trainkit config", **schema, "$defs": definitions}


def _object(schema: type, path: str, descriptions: Mapping[str, str]) -> dict[str, Any]:
    properties = {key: _key(hint, f"{path}{key}", descriptions) for key, hint in hints_of(schema).items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _key(hint: Any, path: str, descriptions: Mapping[str, str]) -> dict[str, Any]:
    """Return the schema of a key's value."""
    inner = dataclass_of(hint)
    options = [option for option in options_of(hint) if option not in (inner, type(None))]
    alternatives = [_object(inner, f"{path}.", descriptions)] if inner is not None else []
    alternatives += [_type(option) for option in options]
    alternatives += [{"type": "string"}] if path in SHORT_FORMS else []
    alternatives += [{"$ref": "#/$defs/off"}] if can_be_off(hint) else []
    described = {"description": descriptions[path]} if path in descriptions else {}
    return {**described, "anyOf": [*alternatives, {"$ref": "#/$defs/interpolation"}]}


def _type(hint: Any) -> dict[str, Any]:
    """Return the schema of a type without dataclasses and None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return {**_type(args[0]), **_bounds(args[1])}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": {"anyOf": [_type(args[0]), {"$ref": "#/$defs/interpolation"}]}}
    return {"type": TYPES[hint]} if hint in TYPES else {"type": "object"}


def _bounds(allowed: Any) -> dict[str, Any]:
    if isinstance(allowed, Pattern):
        return {"pattern": f"^({allowed.regex})$"}
    if isinstance(allowed, Range):
        bounds = {"minimum": allowed.minimum, "exclusiveMinimum": allowed.above, "exclusiveMaximum": allowed.below}
        return {key: bound for key, bound in bounds.items() if bound is not None}
    return {}


def _data_set_keys(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the keys that the data sets add to `data`, such as `data.root`, with any value."""
    keys: dict[str, Any] = {}
    for file in [file for folder in folders for file in sorted((folder / "data").glob("*.yaml"))]:
        comments = key_comments(file)
        known = hints_of(hints_of(RootKeys)["data"])
        for key in sorted(_keys_of(file) - known.keys()):
            keys.setdefault(
                key, {"description": comments[key].text if key in comments else f"used by data={file.stem}"}
            )
    return keys


def _keys_of(file: Path) -> set[str]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # composing this file reports the error
        return set()
    return set(map(str, content)) if isinstance(content, dict) else set()

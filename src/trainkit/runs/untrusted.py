"""Read files of a run that anybody may have written: their type, size and nesting are checked before their content."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import CheckpointError
from trainkit.display.text import SHOWN_METRICS

MAX_BYTES = 2**20  # of a config, and of its overrides
MAX_INFO_BYTES = 2**24  # of run.json: each resume adds an entry
MAX_HISTORY_BYTES = 2**25
MAX_YAML_NODES = 25_000
MAX_YAML_DEPTH = 40
MAX_NUMBER_LENGTH = 1000  # characters; YAML's numbers of base 60 take quadratic time
MAX_INTERPOLATED = 20_000  # characters of all values with interpolations; OmegaConf's parser is slow
# A list of strings without a character that YAML interprets. With an equals sign inside, no line is a number or null.
PLAIN_OVERRIDES = re.compile(r"(?:- [A-Za-z_][A-Za-z0-9_./]*=[A-Za-z0-9_./+,()\[\]-]+\n)+")
HINT = "restore the file, or start a new run"
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Types of the entries of run.json that trainkit reads again.
INFO_TYPES: dict[str, Any] = {
    "status": str,
    "why": str | None,
    "folder": str,
    "config_sha256": list,
    "classes": int | None,
    "resumed": list,
    "best": dict | None,
    "device": str,
    "parameters": int,
    "trainable_parameters": int,
    "train_samples": int | None,
    "val_samples": int | None,
}


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: it is not a regular file, it is larger than `limit` bytes, or it cannot be read.
    """
    try:
        with open_regular_file(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be read: {reason}, expected a regular file", hint=HINT) from error
    if len(content) > limit:
        raise CheckpointError(f"{path} has more than {limit:,} bytes", hint=HINT)
    return content


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; "" if the file cannot be read."""
    try:
        return sha256(read_bytes(path)).hexdigest()
    except (FileNotFoundError, CheckpointError):
        return ""


def read_end(path: Path, limit: int = MAX_BYTES) -> str:
    """Return the text of a regular file, or its last complete lines if it has more than `limit` bytes.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: it is not a regular file, or it cannot be read.
    """
    try:
        with open_regular_file(path) as file:
            start = max(0, file.seek(0, os.SEEK_END) - limit)
            file.seek(start)
            text = file.read(limit).decode(errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", hint=HINT) from error
    return text.partition("\n")[2] if start else text


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as OmegaConf reads it.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: the file cannot be read, is too large or is not valid.
    """
    from omegaconf import OmegaConf  # its import takes longer than the reading of many runs

    content = read_bytes(path)
    with reported(path):
        text = content.decode()
        check_yaml(text)
        return OmegaConf.load(io.StringIO(text))


def read_overrides(path: Path) -> list[str]:
    """Return the strings in a YAML list; an empty list if the file is missing or is not a list.

    Raises:
        CheckpointError: the file is too large, or not a regular file.
    """
    try:
        text = read_bytes(path).decode()
        if PLAIN_OVERRIDES.fullmatch(text):  # most files: this is much faster than YAML
            return [line.removeprefix("- ") for line in text.splitlines()]
        check_yaml(text)
        # Read by yaml: overrides may contain interpolations, which belong to the config.
        listed = yaml.load(text, Loader=YamlLoader)  # a safe loader
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return []
    return list(map(str, listed)) if isinstance(listed, list) else []


def read_info(path: Path) -> dict[str, Any]:
    """Return the content of `run.json`; {} if it is missing.

    Raises:
        CheckpointError: the file is damaged, or an entry has the wrong type.
    """
    try:
        content = read_bytes(path, MAX_INFO_BYTES)
    except FileNotFoundError:
        return {}
    try:
        info = json.loads(content)
        if not isinstance(info, dict):
            raise ValueError("the file does not contain a JSON object")
        _check_info(info)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="repair the file, or write {} into it") from error
    return info


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Raise a `CheckpointError` for any error of the block that the content of the file causes."""
    try:
        yield
    except Exception as error:  # yaml and OmegaConf raise errors of many types
        text = " ".join(str(error).split())[:500]
        raise CheckpointError(f"{path} cannot be read: {text}", hint=HINT) from error


def check_yaml(text: str) -> None:
    """Raise `ValueError` if a text has anchors, or more nodes or levels than a config.

    An alias of an alias of an alias can take any time and memory.
    """
    nodes = depth = interpolated = 0
    for event in yaml.parse(text, Loader=YamlLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("it has YAML anchors, which trainkit does not write")
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if nodes > MAX_YAML_NODES or depth > MAX_YAML_DEPTH:
            raise ValueError(f"it has more than {MAX_YAML_NODES:,} values or {MAX_YAML_DEPTH} levels")
        if not isinstance(event, yaml.ScalarEvent):
            continue
        if re.fullmatch(rf"[-+\d_:.]{{{MAX_NUMBER_LENGTH},}}", event.value):
            raise ValueError(f"it has a number of more than {MAX_NUMBER_LENGTH:,} characters")
        if "${" in event.value:
            interpolated += len(event.value)
            brackets = itertools.accumulate((char in "{[") - (char in "}]") for char in event.value)
            if interpolated > MAX_INTERPOLATED or max(brackets) > MAX_YAML_DEPTH:
                raise ValueError(
                    f"its interpolations have more than {MAX_INTERPOLATED:,} characters "
                    f"or more than {MAX_YAML_DEPTH} levels"
                )


def _check_info(info: dict[str, Any]) -> None:
    """Raise `ValueError` if an entry of `run.json` has the wrong type."""
    for name, kind in INFO_TYPES.items():
        if name in info and (not isinstance(info[name], kind) or isinstance(info[name], bool)):
            raise ValueError(f"{name} is {str(info[name])[:80]!r}, expected {_name_of(kind)}")
    for entry in info.get("resumed", []):
        if not isinstance(entry, dict) or not isinstance(entry.get("allow", []), list):
            raise ValueError(f"resumed contains {str(entry)[:80]!r}, expected an entry of a resume")
    best = info.get("best")
    if best is not None:
        names = ("value", "epoch", *SHOWN_METRICS, best.get("metric"))
        numbers = {name: value for name, value in best.items() if name in names}
        bad = [name for name, value in numbers.items() if not is_number(value)]
        if bad or not isinstance(best.get("metric"), str) or not {"value", "epoch"} <= set(numbers):
            raise ValueError(f"best is {str(best)[:80]!r}, expected the metrics of an epoch")


def is_number(value: Any) -> bool:
    """Return whether a value is a number that fits into a float, and not a bool."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _name_of(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)).replace("dict", "an object")

"""The file `preprocessing.json` of a run: from a raw input to what the model gets, and from its output to names.

With it, a model is used without the training data. Imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from trainkit.core.errors import CheckpointError
from trainkit.runs.directory import Run
from trainkit.runs.untrusted import is_number, read_bytes

FILE = "preprocessing.json"
FORMAT = 1
MAX_BYTES = 2**26  # a vocabulary of words may be long
HINT = "remove the file and resume the run, which writes it again"


@dataclass(frozen=True)
class Statistics:
    """The mean and the standard deviation that are applied to the inputs: one number each, or one per channel."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Preprocessing:
    """How raw inputs become the inputs of a model.

    Attributes:
        inputs: the inputs of one sample before they are converted to floats. A tensor is
            `{"shape": [3, 32, 32], "dtype": "uint8"}`, another value `{"type": "str"}`. Tuples and lists are lists,
            and mappings are mappings. None: no sample could be read.
        normalize: `data.normalize`, applied after uint8 inputs are scaled to 0..1; None: off.
        standardize: the statistics of the training samples, float64; None: off.
        classes: the names of the classes, of a language model its vocabulary; None: unknown.
        reader: how a file becomes a sample, as the data set describes it: an object with `kind`; None: unknown.
    """

    inputs: Any
    normalize: Statistics | None
    standardize: Statistics | None
    classes: list[str] | None
    reader: dict[str, Any] | None


def write_preprocessing(run: Run, preprocessing: Preprocessing) -> None:
    """Write the file of a run, completely or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    run.write_json(FILE, {"format": FORMAT, **asdict(preprocessing)})


def read_preprocessing(run: Run) -> Preprocessing | None:
    """Return the content of the file of a run; None if the run has no such file.

    Raises:
        CheckpointError: the file is damaged, or a newer version has written it.
    """
    path = run.directory / FILE
    try:
        content = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    try:
        return _checked(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint=HINT) from error


def _checked(content: Any) -> Preprocessing:
    """Return the content of a file; raise `ValueError` if it has another form."""
    if not isinstance(content, dict):
        raise ValueError("it does not contain a JSON object")
    if content.get("format") != FORMAT:
        raise ValueError(f"format is {str(content.get('format'))[:80]!r}, expected {FORMAT}")
    classes, reader = content.get("classes"), content.get("reader")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("classes is not a list of names")
    if reader is not None and not (isinstance(reader, dict) and isinstance(reader.get("kind"), str)):
        raise ValueError("reader is not an object with a kind")
    inputs = content.get("inputs")
    _check_inputs(inputs)
    statistics = {name: _statistics(name, content.get(name)) for name in ("normalize", "standardize")}
    return Preprocessing(inputs, classes=classes, reader=reader, **statistics)


def is_tensor(inputs: Any) -> bool:
    """Return whether a part of `Preprocessing.inputs` is a tensor."""
    return isinstance(inputs, dict) and set(inputs) == {"shape", "dtype"} and isinstance(inputs["dtype"], str)


def _check_inputs(inputs: Any) -> None:
    if is_tensor(inputs):
        shape = inputs["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"inputs have the shape {str(shape)[:80]}, expected a list of sizes")
    elif isinstance(inputs, dict | list):
        for part in inputs.values() if isinstance(inputs, dict) else inputs:
            _check_inputs(part)
    elif inputs is not None and not isinstance(inputs, str):
        raise ValueError(f"inputs contain {str(inputs)[:80]!r}, expected tensors")


def _statistics(name: str, value: Any) -> Statistics | None:
    """Return the statistics in the file; raise `ValueError` if the value has another form."""
    if value is None:
        return None
    mean, std = (value.get(key) for key in ("mean", "std")) if isinstance(value, dict) else (None, None)
    if not (_are_numbers(mean) and _are_numbers(std)) or len(mean) != len(std) or 0 in std:
        raise ValueError(f"{name} is {str(value)[:80]!r}, expected a mean and a standard deviation of equal length")
    return Statistics(mean, std)


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(is_number(value) and math.isfinite(value) for value in values)

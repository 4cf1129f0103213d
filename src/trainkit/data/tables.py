"""Tables: the columns of a CSV or parquet file as inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from trainkit.core.errors import ConfigError, DataError
from trainkit.core.spelling import did_you_mean
from trainkit.data.table_files import Column, Numbers, read_columns

TASKS = ("auto", "classification", "regression")
AVERAGES: dict[str, Callable[[list[float]], float]] = {"mean": fmean, "median": median}  # that `data.fill` may name
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Table(TensorDataset):
    """The rows of a table.

    Attributes:
        columns: the name of each input; a category has the name `COLUMN=VALUE`.
        classes: the names of the classes; for a regression, the number of target columns.
        reader: how the columns become inputs, for `preprocessing.json`.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, encoding: Encoding, classes: list[str] | int) -> None:
        super().__init__(inputs, targets)
        self.columns, self.classes = encoding.inputs, classes
        self.reader = {"kind": "table", **asdict(encoding)}


@dataclass(frozen=True)
class Encoding:
    """How the columns of a table become inputs.

    Attributes:
        columns: name -> the words of a column, each of which is one input; None for a column of numbers.
        fill: replaces missing numbers: one number, or a number for each column of numbers. A missing word is the word
            "". None: missing inputs are an error.
        targets: the names of the columns of the targets.
    """

    columns: dict[str, list[str] | None]
    fill: float | Mapping[str, float] | None
    targets: list[str]

    @property
    def inputs(self) -> list[str]:
        """The name of each input; that of a word is `COLUMN=WORD`."""
        named = self.columns.items()
        return [label for name, words in named for label in ([f"{name}={w}" for w in words] if words else [name])]

    def encode(self, rows: Mapping[str, Column], file: str, first: int = 1) -> Tensor:
        """Return the inputs of rows, (N, F) float32.

        Args:
            rows: the columns of a file; each column of the encoding must exist.
            file: the name of the file, for messages.
            first: the number of the first row, for messages.

        Raises:
            DataError: a value is missing, not a number, or a word that the training set does not have.
        """
        parts = [self._encode_column(name, words, rows[name], file, first) for name, words in self.columns.items()]
        return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    def _encode_column(self, name: str, words: list[str] | None, rows: Column, file: str, first: int) -> Numbers:
        lacking = _missing(rows, first)
        if lacking and self.fill is None:
            effect = "=mean, median or a number" if words is None else "=0: it becomes a category of its own"
            hint = f"write data.fill{effect}; or leave the column out: data.drop={name}"
            raise _missing_error(file, name, lacking, hint)
        if words is not None:
            one_hot: Numbers = np.eye(len(words))[_numbered(name, words, rows, file)]
            return one_hot
        numbers = _as_numbers(name, rows, file, first)
        number = self.fill[name] if isinstance(self.fill, Mapping) else self.fill
        filled: Numbers = np.where(np.isnan(numbers), number or 0.0, numbers)
        return filled[:, None]


def table(
    file: str,
    target: str | Sequence[str],
    part: str = "train",
    val_file: str | None = None,
    drop: str | Sequence[str] = (),
    task: str = "auto",
    fill: float | str | None = None,
) -> Table | None:
    """Return the rows of a CSV file (UTF-8, with a header), a TSV file or a parquet file.

    Each column of numbers is one input. A column of words is one-hot: one input for each of its words, in the order
    of the alphabet. The words and the classes are those of `file`, also for the rows of `val_file`.

    Args:
        file: the file of the training set; `package:NAME` for a file of trainkit.
        target: the column of the targets; several columns for a regression with several outputs.
        part: train, or val for the rows of `val_file`.
        val_file: the file of the validation set.
        drop: a column that is not an input, or several.
        task: `classification` (each different value is a class), `regression`, or `auto`: classification for a column
            of words, regression for numbers.
        fill: replaces missing numbers: a number, or the `mean` or `median` of the column in `file`. A missing word
            becomes a category of its own. None: missing inputs are an error.

    Returns:
        The rows. None for the part `val` without a `val_file`.

    Shape: inputs (N, F) float32; targets (N,) int64 of classes, or (N, number of targets) float32.

    Raises:
        ConfigError: a column does not exist, or an argument is wrong.
        DataError: a file cannot be read, or values are missing.
    """
    if part == "val" and not val_file:
        return None
    if task not in TASKS:
        raise ConfigError(f"data.task={task}: there is no such task", hint=did_you_mean(task, TASKS, "data.task="))
    if not _is_fill(fill):
        hint = "null: missing inputs are an error"
        raise ConfigError(f"data.fill={fill}: must be a number, mean or median", hint=hint)
    targets, dropped = _names(target), _names(drop)
    if not targets:
        raise ConfigError("data.target names no column", hint="write data.target=COLUMN")
    columns = read_columns(file)
    names = _input_columns(columns, file, targets, dropped)
    rows = columns
    if part == "val" and val_file:
        rows = read_columns(val_file, [name for name in names if isinstance(columns[name], list)])
        lacking = next((name for name in [*names, *targets] if name not in rows), None)
        if lacking is not None:
            raise DataError(f"{val_file}: it has no column {lacking!r}", hint=f"it needs the columns of {file}")
    source = val_file if part == "val" and val_file else file
    words = {name: _words_of(columns[name]) for name in names}
    averages = _averages(fill, {name: columns[name] for name in names}, file) if isinstance(fill, str) else fill
    encoding = Encoding(words, averages, targets)
    inputs = encoding.encode(rows, source)
    made_targets, classes = _targets(targets, columns, rows, task, source)
    return Table(inputs, made_targets, encoding, classes)


def _names(given: str | Sequence[str] | None) -> list[str]:
    """Return the names of columns. A name alone is a column; YAML reads some names as numbers."""
    names: Sequence[Any] = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [str(name) for name in names if name is not None]


def _is_fill(fill: Any) -> bool:
    if isinstance(fill, int | float) and not isinstance(fill, bool):
        return abs(fill) <= FLOAT32_MAX
    return fill is None or (isinstance(fill, str) and fill in AVERAGES)


def _averages(name_of_average: str, columns: Mapping[str, Column], file: str) -> dict[str, float]:
    """Return the mean or the median of each column of numbers, without its missing values."""
    averages = {}
    for name, column in columns.items():
        if isinstance(column, list):
            continue
        present = column[~np.isnan(_finite(name, column, file, 1))].tolist()
        if not present:
            cause = f"data.fill={name_of_average}: the column {name!r} of {file} has no value"
            raise DataError(cause, hint=f"leave the column out: data.drop={name}")
        averages[name] = AVERAGES[name_of_average](present)
    return averages


def _input_columns(
    columns: Mapping[str, Column], file: str, targets: Sequence[str], dropped: Sequence[str]
) -> list[str]:
    """Return the names of the columns that are inputs.

    Raises:
        ConfigError: the file lacks a target or a dropped column, or no column is left.
    """
    for key, names in (("target", targets), ("drop", dropped)):
        for name in names:
            if name not in columns:
                hint = did_you_mean(name, columns)
                raise ConfigError(f"data.{key}={name}: {file} has no such column", hint=hint)
    inputs = [name for name in columns if name not in targets and name not in dropped]
    if not inputs:
        raise ConfigError(f"{file}: no column is left for the inputs", hint="change data.target or data.drop")
    return inputs


def _words_of(column: Column) -> list[str] | None:
    """Return the different words of a column in the order of the alphabet; None for a column of numbers."""
    return sorted({word or "" for word in column}) if isinstance(column, list) else None


def _targets(
    names: list[str], columns: dict[str, Column], rows: dict[str, Column], task: str, file: str
) -> tuple[Tensor, list[str] | int]:
    """Return the targets, and the names of the classes or the number of target columns."""
    for name in names:
        if lacking := _missing(rows[name]):
            raise _missing_error(file, name, lacking, "remove these rows from the file: each row needs its target")
    is_class = task == "classification" or (task == "auto" and isinstance(columns[names[0]], list))
    if is_class and len(names) > 1:
        raise ConfigError(f"data.target={names}: a classification has one target", hint=f"write data.target={names[0]}")
    if is_class:
        classes = _classes(columns[names[0]])
        numbered = _numbered(names[0], classes, _words(rows[names[0]]), file)
        return torch.from_numpy(numbered), classes
    numbers = [_as_numbers(name, rows[name], file) for name in names]
    return torch.from_numpy(np.stack(numbers, axis=1).astype(np.float32)), len(names)


def _classes(column: Column) -> list[str]:
    """Return the different values of a column, in the order of the numbers or of the alphabet."""
    if isinstance(column, list):
        return sorted({word for word in column if word is not None})
    return [word for word in _words(np.unique(column)) if word is not None]


def _words(column: Column) -> list[str | None]:
    """Return the values of a column as texts; whole numbers have no decimal point."""
    return column if isinstance(column, list) else [f"{value:.15g}" for value in column]


def _numbered(name: str, words: list[str], rows: Column, file: str) -> np.ndarray[Any, Any]:
    """Return the number of each row's word, (N,) int64."""
    number = {word: index for index, word in enumerate(words)}
    values = [word or "" for word in _words(rows)]
    unknown = next((value for value in values if value not in number), None)
    if unknown is not None:
        cause = f"{file}: the training set has no value {unknown!r} in the column {name!r}"
        raise DataError(cause, hint="give both sets the same values, or leave the column out: data.drop")
    return np.array([number[value] for value in values], dtype=np.int64)


def _as_numbers(name: str, rows: Column, file: str, first: int = 1) -> Numbers:
    if not isinstance(rows, list):
        return _finite(name, rows, file, first)
    for line, value in enumerate(rows, start=first):
        try:
            float(value or "nan")
        except ValueError:
            hint = "correct the value; for a column of class names write data.task=classification"
            raise DataError(
                f"{file}: row {line} of the column {name!r} is {value!r}, not a number", hint=hint
            ) from None
    return _finite(name, np.array([float(value or "nan") for value in rows]), file, first)


def _finite(name: str, numbers: Numbers, file: str, first: int) -> Numbers:
    """Return numbers that fit into float32. NaN is a missing value, which is reported as such."""
    outside = np.flatnonzero(np.abs(numbers) > FLOAT32_MAX)
    if len(outside):
        place = f"{file}: row {outside[0] + first} of the column {name!r}"
        cause = f"{place} is {numbers[outside[0]]:g}, outside of float32"
        raise DataError(cause, hint="correct the value, or leave the column out: data.drop")
    return numbers


def _missing(rows: Column, first: int = 1) -> list[int]:
    """Return the numbers of the rows without a value; `first` is that of the first row."""
    lacking = [value is None for value in rows] if isinstance(rows, list) else np.isnan(rows)
    return (np.flatnonzero(lacking) + first).tolist()


def _missing_error(file: str, name: str, rows: list[int], hint: str) -> DataError:
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return DataError(f"{file}: the column {name!r} has no value in row {shown}", hint=hint)

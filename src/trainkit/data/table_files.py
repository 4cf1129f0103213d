"""Read the columns of a CSV or parquet file."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.core.errors import ConfigError, DataError
from trainkit.data.files import read_data_file

Numbers = np.ndarray[Any, np.dtype[np.float64]]  # a missing number is NaN
Column = Numbers | list[str | None]  # of numbers or of words; a missing word is None
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
HINT = "name a CSV or parquet file with data.file=FILE"


def read_columns(file: str, words: Collection[str] = ()) -> dict[str, Column]:
    """Return the columns of a file by name. A column of which each value is a number or missing holds numbers.

    Args:
        file: a CSV file in UTF-8 with a header, a TSV file, or a parquet file; `package:NAME` for a file of trainkit.
        words: the names of columns that hold words, also if each word is a number.

    Raises:
        ConfigError: the package that reads parquet is not installed.
        DataError: the file cannot be read, is empty, or is not a table.
    """
    try:
        content = read_data_file(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}", hint=HINT) from error
    return parse_columns(file, content, words)


def parse_columns(file: str, content: bytes, words: Collection[str] = ()) -> dict[str, Column]:
    """Return the columns of the content of a file; see `read_columns`."""
    if not content.strip():
        raise DataError(f"{file}: the file is empty", hint=HINT)
    is_parquet = content[:4] == b"PAR1" or Path(file).suffix in (".parquet", ".pq")
    columns = _parquet(file, content) if is_parquet else _csv(file, content)
    if not next(iter(columns.values()), []):
        raise DataError(f"{file}: the table has no rows", hint=HINT)
    return {name: _words(values) if name in words else _numbers(values) for name, values in columns.items()}


def _csv(file: str, content: bytes) -> dict[str, list[Any]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8", hint="save the table as CSV in UTF-8") from error
    header = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in "\t;" if mark in header and "," not in header), ",")
    delimiter = "\t" if Path(file).suffix == ".tsv" else delimiter
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if rows and row and len(row) != len(rows[0]):
                cause = f"{file}: line {reader.line_num} has {len(row)} values, and the header has {len(rows[0])}"
                raise DataError(cause, hint="correct that line; a value that contains a comma needs quotes")
            if row:
                rows.append(row)
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: {error}", hint="correct that line") from error
    names = [name.strip() for name in rows[0]]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        cause = f"{file}: several columns have the name {repeated!r}"
        raise DataError(cause, hint="the first line must be a header with a different name for each column")
    values = zip(*rows[1:], strict=True) if rows[1:] else [[] for _ in names]
    return {name: list(column) for name, column in zip(names, values, strict=True)}


def _parquet(file: str, content: bytes) -> dict[str, list[Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        hint = "install it: pip install pyarrow"
        raise ConfigError(f"data.file={file}: the package pyarrow is not installed", hint=hint) from None
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: it is not a parquet file: {reason}", hint=HINT) from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _numbers(values: list[Any]) -> Column:
    """Return a column as numbers if each value is a number or missing, else as words."""
    try:
        numbers = [np.nan if _is_missing(value) else _number(value) for value in values]
        return np.array(numbers, dtype=np.float64)
    except (TypeError, ValueError):
        return _words(values)


def _words(values: list[Any]) -> list[str | None]:
    return [None if _is_missing(value) else str(value).strip() for value in values]


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in MISSING)


def _number(value: Any) -> float:
    """Return a number; raise `ValueError` or `TypeError` for truth values, and texts that only Python reads so."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError
    return float(value)

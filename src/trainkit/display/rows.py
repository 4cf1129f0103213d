"""Rows of predictions as text: CSV or JSON lines, one at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from trainkit.core.errors import ConfigError
from trainkit.display.text import finite_or_null

FORMATS = ("csv", "jsonl")
NESTED = ("outputs", "map")  # columns that CSV has no place for


class RowText:
    """Turns rows into text. A name that is not UTF-8 keeps its bytes in CSV, and is escaped in JSON.

    Args:
        form: `csv` or `jsonl`. CSV begins with the names of the columns of the first row. A column that is a mapping
            becomes a column `p_NAME` for each of its entries, and a list becomes JSON.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.columns: list[str] | None = None

    def encode(self, row: Mapping[str, Any]) -> bytes:
        """Return the line of a row, with its end.

        Raises:
            ConfigError: CSV has no place for the outputs of the model.
        """
        if self.form == "jsonl":
            return (json.dumps(finite_or_null(row)) + "\n").encode()
        nested = next((name for name in NESTED if isinstance(row.get(name), list | dict)), None)
        if nested is not None:
            cause = "the outputs of this model are not classes or numbers, and CSV has no place for them"
            raise ConfigError(cause, hint="write --format jsonl")
        flat: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, Mapping):
                flat |= {f"p_{key}": entry for key, entry in value.items()}
            else:
                flat[name] = json.dumps(value) if isinstance(value, list) else value
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if self.columns is None:
            self.columns = [*flat]
            writer.writerow(self.columns)
        writer.writerow([flat.get(name) for name in self.columns])
        return text.getvalue().encode(errors="surrogateescape")


def place_text(place: Mapping[str, Any]) -> str:
    """Return where a sample is, for messages: `FILE`, or `FILE, row 3`.

    Args:
        place: the columns of its row that say so: `file`, and `row` or `line`.
    """
    return ", ".join(str(value) if key == "file" else f"{key} {value}" for key, value in place.items())

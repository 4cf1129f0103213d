"""Say in words how a file or a row becomes a raw input, for the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainkit.core.terminal import printable
from trainkit.data.tables import Encoding
from trainkit.engine.readers import describes_images, table_encoding

MAX_INPUTS = 200  # names in a card; the metadata of the file has all


def reading_steps(reader: Mapping[str, Any]) -> list[str]:
    """Return the steps from a file to a raw input.

    Args:
        reader: how the data set of the training describes them, in any form; see `Preprocessing.reader`.
    """
    encoding = table_encoding(reader)
    if encoding is not None:
        return _table_steps(encoding)
    if describes_images(reader):
        return [f"Convert the image to {reader.get('mode', 'RGB')}.", *_size_steps(reader.get("size"))]
    shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in reader.items() if len(json.dumps(value)) < 60)
    return [f"A raw input is read as: {shown}.".replace("`", "'")]


def _table_steps(encoding: Encoding) -> list[str]:
    names = encoding.inputs
    more = f" The first {MAX_INPUTS} are shown; the metadata has all." if len(names) > MAX_INPUTS else ""
    steps = [f"The {len(names):,} inputs are, in this order: {_as_code(names[:MAX_INPUTS])}.{more}"]
    if any(words is not None for words in encoding.columns.values()):
        steps.append(
            "An input `COLUMN=VALUE` is 1 if the column has this value, else 0. Nothing after `=`: a missing value."
        )
    if encoding.fill is not None:
        steps.append(f"A missing number is replaced by {_as_code(encoding.fill)}.")
    return steps


def _size_steps(size: Any) -> list[str]:
    if size is None:
        return []
    if isinstance(size, int):
        return [f"The shorter side is resized to {size} pixels, then the center is cropped to {size}x{size}."]
    return [f"The image is cropped to the ratio of {size[0]}x{size[1]} pixels (height x width), and resized to them."]


def _as_code(value: Any) -> str:
    """Return a value as JSON in a span of code, which no name can end."""
    return f"`{printable(json.dumps(value, ensure_ascii=False)).replace('`', chr(92) + 'u0060')}`"

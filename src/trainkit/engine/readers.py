"""Choose how the files of a prediction become samples, from the preprocessing of the run and its data set."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainkit.build.data import build_dataset
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.data.images import MODES
from trainkit.data.raw_files import ARRAYS, ArrayReader, CustomReader, ImageReader, LineReader, Reader, TableReader
from trainkit.data.tables import Encoding
from trainkit.runs.preprocessing import Preprocessing, is_tensor

CUSTOM = "read_input"  # the function of a data set that reads a file
HINT = (
    "give the data set a static method read_input(file) that returns the inputs of a sample, or an attribute reader; "
    "docs/predict.md shows both"
)


def choose_reader(settings: Settings, preprocessing: Preprocessing, files: Sequence[str]) -> Reader:
    """Return the reader of the files.

    Args:
        settings: the settings of the run.
        preprocessing: the preprocessing of the run.
        files: files and folders. If all are arrays, they are read as such.

    Raises:
        ConfigError: the run does not say how such files become samples.
        CheckpointError: the reader in the file of the run is damaged.
    """
    inputs = preprocessing.inputs
    if is_tensor(inputs) and files and all(Path(file).suffix in ARRAYS for file in files):
        return ArrayReader(inputs["shape"], inputs["dtype"])
    function = _custom_function(settings)
    if function is not None:
        return CustomReader(function)
    if preprocessing.reader is not None:
        return _described_reader(preprocessing.reader, preprocessing.classes)
    shape = inputs["shape"] if is_tensor(inputs) and inputs["dtype"] == "uint8" else []
    if len(shape) == 3 and shape[0] in MODES:
        reader = ImageReader(MODES[shape[0]], shape[1:])
        size = f"{shape[1]}x{shape[2]} pixels"
        reader.notes.append(f"note: images are cropped to the ratio of {size}, and resized to them")
        return reader
    name = settings.data.train.get("_target_")
    cause = f"{files[0] if files else 'FILE'}: the run does not say how a file becomes a sample of {name}"
    more = f"; arrays ({', '.join(ARRAYS)}) of samples {tuple(inputs['shape'])} work" if is_tensor(inputs) else ""
    raise ConfigError(cause, hint=HINT + more)


def _custom_function(settings: Settings) -> Any:
    """Return the function `read_input` of the data set; None if it has none.

    A method that is not static needs the data set itself, which is built for it.
    """
    part = "val" if settings.data.val is not None else "train"
    target = locate(getattr(settings.data, part)["_target_"])
    found = inspect.getattr_static(target, CUSTOM, None)
    if found is None:
        return None
    if not inspect.isclass(target) or isinstance(found, staticmethod | classmethod):
        return getattr(target, CUSTOM)
    dataset = build_dataset(settings, part)
    return getattr(build_dataset(settings, "train") if dataset is None else dataset, CUSTOM)


def _described_reader(described: dict[str, Any], classes: list[str] | None) -> Reader:
    """Return the reader that the data set of the training described. The types are those of a file: any.

    Raises:
        CheckpointError: the description has another form.
        ConfigError: its kind is unknown.
    """
    kind = described["kind"]
    with suppress(KeyError, TypeError):
        if describes_images(described):
            return ImageReader(described.get("mode", "RGB"), described.get("size"))
        if kind == "text" and classes is not None and described["unit"] in ("characters", "words", "bytes"):
            return LineReader(described["unit"], classes)
        encoding = table_encoding(described)
        if encoding is not None:
            return TableReader(encoding)
    if kind not in ("images", "text", "table"):
        cause = (
            f"predict cannot read files of the kind {kind[:80]!r}, which the data set of this run names as its reader"
        )
        raise ConfigError(cause, hint=HINT)
    cause = f"the reader in the preprocessing.json of the run is damaged: {str(described)[:80]}"
    raise CheckpointError(cause, hint="remove the file and resume the run, which writes it again")


def describes_images(described: Mapping[str, Any]) -> bool:
    """Return whether a description of a reader is that of images, with a valid mode and size."""
    is_mode = described.get("mode", "RGB") in MODES.values()
    return described.get("kind") == "images" and is_mode and _is_size(described.get("size"))


def table_encoding(described: Mapping[str, Any]) -> Encoding | None:
    """Return the encoding that a description of a reader has; None if it is not that of a table, or is damaged."""
    if described.get("kind") != "table" or not {"columns", "fill", "targets"} <= described.keys():
        return None
    encoding = Encoding(described["columns"], described["fill"], described["targets"])
    is_valid = _are_columns(encoding.columns) and _is_fill(encoding) and isinstance(encoding.targets, list)
    return encoding if is_valid else None


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    return size is None or all(type(side) is int and 0 < side < 2**16 for side in sides)


def _are_columns(columns: Any) -> bool:
    """Return whether a value maps the names of columns to lists of words, or to None."""
    lists = [words for words in columns.values() if words is not None] if isinstance(columns, dict) else []
    is_list = all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists)
    return isinstance(columns, dict) and bool(columns) and is_list


def _is_fill(encoding: Encoding) -> bool:
    """Return whether `fill` is None, a number, or a number for each column of numbers."""
    fill: Any = encoding.fill
    names = [name for name, words in encoding.columns.items() if words is None]
    numbers = [fill.get(name) for name in names] if isinstance(fill, dict) else [0 if fill is None else fill]
    return all(isinstance(value, int | float) for value in numbers)

"""Read files that are not part of a data set, for predictions: the same samples that the training would get."""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import DataError, TrainkitError, UserCodeError
from trainkit.data.files import read_data_file
from trainkit.data.images import fit_image, read_image
from trainkit.data.table_files import Column, parse_columns
from trainkit.data.tables import Encoding
from trainkit.data.text import number_tokens, split_tokens

STDIN = "-"
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".npz", ".pt")


@dataclass(frozen=True)
class RawSample:
    """A sample from a file.

    Attributes:
        place: where the sample is: its file, and for files with several samples its row or line.
        inputs: the inputs of the sample, as the data set of the training would return them.
        error: why it cannot be read; "" if it can.
    """

    place: Mapping[str, Any]
    inputs: Any = None
    error: str = ""


@dataclass
class Reader(ABC):
    """Reads the samples of a file.

    Attributes:
        noun: what the files are, in the plural, for messages.
        suffixes: of the files that belong to it in a folder; None: all files.
        takes_stdin: whether it can read the standard input.
        notes: lines about what was ignored; each is added once.
    """

    noun: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...] | None]
    takes_stdin: ClassVar[bool] = False
    notes: list[str] = field(default_factory=list, init=False)

    @abstractmethod
    def read(self, file: str) -> Iterator[RawSample]:
        """Yield the samples of a file; the errors of a file that cannot be read are raised."""


@dataclass
class ImageReader(Reader):
    """Reads a file as an image; see `fit_image` for the size."""

    noun = "images"
    suffixes = IMAGES

    mode: str
    size: int | Sequence[int] | None

    def __post_init__(self) -> None:
        self._fit = fit_image(self.size)

    def read(self, file: str) -> Iterator[RawSample]:
        """See `Reader.read`."""
        image = read_image(file, self.mode)
        yield RawSample({"file": file}, image if self._fit is None else self._fit(image))


@dataclass
class TableReader(Reader):
    """Reads the rows of a table. Columns that are not inputs are ignored."""

    noun = "tables"
    suffixes = (".csv", ".tsv", ".parquet", ".pq")
    takes_stdin = True

    encoding: Encoding

    def read(self, file: str) -> Iterator[RawSample]:
        """See `Reader.read`."""
        content = sys.stdin.buffer.read() if file == STDIN else read_data_file(file)
        wanted = self.encoding.columns
        columns = parse_columns(file, content, [name for name, words in wanted.items() if words is not None])
        lacking = [name for name in wanted if name not in columns]
        if lacking:
            raise DataError(f"{file}: it has no column {lacking[0]!r}", hint=f"it needs {', '.join(wanted)}")
        extra = [name for name in columns if name not in wanted and name not in self.encoding.targets]
        if extra:
            self.notes.append(f"note: {file}: the model does not use {', '.join(extra)}")
        columns = {name: columns[name] for name in wanted}
        rows = len(next(iter(columns.values())))
        try:
            for row, inputs in enumerate(self.encoding.encode(columns, file), start=1):
                yield RawSample({"file": file, "row": row}, inputs)
        except DataError:  # raised before the first row
            for row in range(1, rows + 1):
                yield self._read_row(columns, file, row)

    def _read_row(self, columns: Mapping[str, Column], file: str, row: int) -> RawSample:
        place = {"file": file, "row": row}
        try:
            one = {name: column[row - 1 : row] for name, column in columns.items()}
            return RawSample(place, self.encoding.encode(one, file, first=row)[0])
        except DataError as error:
            return RawSample(place, error=error.problems[0].cause.removeprefix(f"{file}: "))


@dataclass
class LineReader(Reader):
    """Reads the lines of a text as token ids, (T,) int64."""

    noun = "texts"
    suffixes = (".txt", ".text", ".md")
    takes_stdin = True

    unit: str
    vocabulary: Sequence[str]

    def __post_init__(self) -> None:
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}

    def read(self, file: str) -> Iterator[RawSample]:
        """See `Reader.read`."""
        for number, line in enumerate(read_lines(file), start=1):
            place = {"file": file, "line": number}
            try:
                yield RawSample(place, number_tokens(split_tokens(line, self.unit), self._ids))
            except UnicodeDecodeError as error:
                yield RawSample(place, error=f"byte {error.start} is not UTF-8")


def read_lines(file: str) -> Iterator[bytes]:
    """Yield the lines of a file, or of the standard input, without their ends."""
    if file == STDIN:
        yield from (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    else:
        with open_regular_file(Path(file).expanduser(), follow_links=True) as opened:
            yield from (line.rstrip(b"\r\n") for line in opened)


@dataclass
class ArrayReader(Reader):
    """Reads the samples of an array: `.npy`, the array `X` of an `.npz`, or a tensor in a `.pt` file.

    Args:
        shape: of a sample. The array is one sample, or a batch of samples.
        dtype: of the training samples. Floats are converted to it, and integers must fit into it.
    """

    noun = "arrays"
    suffixes = ARRAYS

    shape: Sequence[int]
    dtype: str

    def read(self, file: str) -> Iterator[RawSample]:
        """See `Reader.read`."""
        array = load_array(file)
        shape = tuple(self.shape)
        if tuple(array.shape) == shape:
            yield RawSample({"file": file}, self._convert(array, file))
            return
        if tuple(array.shape[1:]) != shape:
            found = f"the array has the shape {tuple(array.shape)}"
            raise DataError(f"{file}: {found}, and a sample has {shape}", hint=f"save an array (N, *{shape})")
        for row, sample in enumerate(self._convert(array, file), start=1):
            yield RawSample({"file": file, "row": row}, sample)

    def _convert(self, array: Tensor, file: str) -> Tensor:
        dtype = getattr(torch, self.dtype, array.dtype)
        if array.dtype == dtype or (dtype.is_floating_point and not array.is_complex()):
            return array.to(dtype)
        is_integer = not array.is_floating_point() and not array.is_complex()
        converted = array.to(dtype)
        if is_integer and converted.to(array.dtype).equal(array):
            return converted
        cause = f"{file}: the array is {array.dtype}".replace("torch.", "")
        raise DataError(f"{cause}, and the training has {self.dtype}", hint=f"save it as {self.dtype}")


def load_array(file: str) -> Tensor:
    """Return the tensor in a file. No code in the file is executed."""
    with open_regular_file(Path(file).expanduser(), follow_links=True) as opened:
        if file.endswith(".pt"):
            try:
                content = torch.load(opened, map_location="cpu", weights_only=True)
            except Exception as error:  # torch and pickle raise errors of many types
                raise DataError(f"{file}: {' '.join(str(error).split())[:200]}") from error
        else:
            content = np.load(opened, allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            if "X" not in content.files:
                raise DataError(f"{file}: it has no array 'X'", hint=f"it has {', '.join(content.files)}")
            content = content["X"]
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(content))
    if not isinstance(content, Tensor):
        raise DataError(f"{file}: it does not hold an array of numbers", hint="save a single array or tensor")
    return content


@dataclass
class CustomReader(Reader):
    """Reads a file by the function of a data set, which returns the inputs of a sample."""

    noun = "files"
    suffixes = None

    function: Callable[[str], Any]

    def read(self, file: str) -> Iterator[RawSample]:
        """See `Reader.read`."""
        yield RawSample({"file": file}, self.function(file))


def read_samples(
    files: Sequence[str], reader: Reader, is_unreadable: Callable[[Exception], bool]
) -> Iterator[RawSample]:
    """Yield the samples of files in order. Those that cannot be read have an `error`.

    Args:
        files: may name a file several times.
        reader: reads a file.
        is_unreadable: whether the file causes an error, rather than the code; other errors are raised.
    """
    for file in files:
        try:
            yield from reader.read(file)
        except Exception as error:
            if isinstance(reader, CustomReader) and not is_unreadable(error):
                raise UserCodeError("data.read_input", error, exit_code=1) from error
            if not isinstance(error, TrainkitError | ValueError) and not is_unreadable(error):
                raise
            text = error.problems[0].cause if isinstance(error, TrainkitError) else _reason(error)
            yield RawSample({"file": file}, error=text.removeprefix(f"{file}: "))


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return re.sub(r" <_io\.[^>]*>", "", str(text))[:300]  # PIL names the open file, not its path

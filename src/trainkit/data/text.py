"""Texts as windows of token ids, for language models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from trainkit.core.errors import ConfigError, DataError
from trainkit.core.spelling import did_you_mean
from trainkit.data.files import read_data_file

UNITS = ("characters", "words", "bytes")
UNKNOWN = "<unk>"  # the token of characters and words that the training part does not have
WORD = re.compile(r"\n|\w+(?:['’]\w+)*|[^\w\s]")  # noqa: RUF001  # a line break, a word, or a punctuation mark


class TextWindows(TensorDataset):
    """Windows of token ids, and as targets the tokens that follow each of them.

    Attributes:
        vocabulary: the token of each id.
        classes: the same, which gives `data.classes` its number.
        lengths: the length of each window.
        reader: how a text becomes tokens, for `preprocessing.json`.
    """

    def __init__(self, tokens: Tensor, vocabulary: list[str], length: int, stride: int, unit: str) -> None:
        # Views of the same memory: overlapping windows are not copied.
        super().__init__(tokens[:-1].unfold(0, length, stride), tokens[1:].unfold(0, length, stride))
        self.vocabulary = self.classes = vocabulary
        self.lengths = [length] * len(self)
        self.reader = {"kind": "text", "unit": unit, "length": length}


def text(
    file: str,
    length: int = 64,
    unit: str = "characters",
    part: str = "train",
    fraction: float = 0.1,
    val_file: str | None = None,
    stride: int | None = None,
    min_count: int = 1,
) -> TextWindows:
    """Return the windows of a text file in UTF-8, in their order.

    The last `fraction` of the file is the validation part, unless there is a `val_file`. The vocabulary is that of the
    training part. The last tokens of a part that do not fill a window are left out.

    Args:
        file: the file, or `package:NAME` for a file of trainkit, such as `package:coriolanus.txt`.
        length: tokens of a window.
        unit: what a token is: `characters`, `words` (words, punctuation marks and line breaks), or `bytes`.
        part: train or val.
        fraction: the fraction of the tokens that is the validation part.
        val_file: the file of the validation part.
        stride: tokens from the start of a window to the start of the next; None: `length`, so windows do not overlap.
        min_count: words that occur less often in the training part become the unknown token.

    Shape: inputs and targets (N, length) int64.

    Raises:
        ConfigError: an argument is wrong.
        DataError: a file cannot be read, or a part is shorter than a window.
    """
    if unit not in UNITS:
        raise ConfigError(f"data.unit={unit}: there is no such unit", hint=did_you_mean(unit, UNITS, "data.unit="))
    for name, size in (("length", length), ("stride", length if stride is None else stride)):
        if size < 1:
            raise ConfigError(f"data.{name}={size}: must be 1 or more", hint=f"write data.{name}=64")
    if not 0 < fraction < 1:
        raise ConfigError(f"data.fraction={fraction}: must be between 0 and 1", hint="write data.fraction=0.1")
    whole = _tokens_of(file, unit)
    end = len(whole) if val_file else round(len(whole) * (1 - fraction))
    vocabulary = _vocabulary(whole[:end], min_count)
    chosen = whole[:end]
    if part == "val":
        chosen = _tokens_of(val_file, unit) if val_file else whole[end:]
    if len(chosen) <= length:
        raise DataError(
            f"{(val_file if part == 'val' else None) or file}: the {part} part has {len(chosen)} {unit}, "
            f"and a window needs {length + 1}",
            hint="write a smaller data.length, or give a longer text",
        )
    numbers = number_tokens(chosen, {token: index for index, token in enumerate(vocabulary)})
    return TextWindows(numbers, vocabulary, length, stride or length, unit)


def _tokens_of(file: str, unit: str) -> str | list[str] | bytes:
    """Return the tokens of a file.

    Raises:
        DataError: the file cannot be read, is empty, or is not UTF-8.
    """
    try:
        content = read_data_file(file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{file}: {reason}", hint="name a text file with data.file=FILE") from error
    if not content:
        raise DataError(f"{file}: the file is empty", hint="name a text file with data.file=FILE")
    try:
        return split_tokens(content, unit)
    except UnicodeDecodeError as error:
        hint = "convert it to UTF-8, or write data.unit=bytes"
        raise DataError(f"{file}: byte {error.start} is not UTF-8", hint=hint) from error


def split_tokens(content: bytes, unit: str) -> str | list[str] | bytes:
    """Return the tokens of a text; raise `UnicodeDecodeError` if characters or words are not UTF-8."""
    if unit == "bytes":
        return content
    characters = content.decode("utf-8")
    return characters if unit == "characters" else WORD.findall(characters)


def number_tokens(tokens: str | list[str] | bytes, ids: Mapping[str, int]) -> Tensor:
    """Return the id of each token, (N,) int64; that of the unknown token is 0. The ids of bytes are their values."""
    numbers = list(tokens) if isinstance(tokens, bytes) else [ids.get(token, 0) for token in tokens]
    return torch.tensor(numbers, dtype=torch.int64)


def _vocabulary(tokens: str | list[str] | bytes, min_count: int) -> list[str]:
    """Return the token of each id: the unknown token, and then the tokens in the order of the alphabet."""
    if isinstance(tokens, bytes):
        return [repr(bytes([value])) for value in range(256)]
    counts = Counter(tokens)
    return [UNKNOWN, *sorted(token for token, count in counts.items() if count >= min_count)]

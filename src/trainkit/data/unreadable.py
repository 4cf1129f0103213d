"""Samples that cannot be read: the limit of `data.on_unreadable=skip`, and the errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainkit.core.errors import DataError
from trainkit.core.source import name_and_place
from trainkit.data.reading import name_of
from trainkit.data.sample_errors import base_of

MAX_UNREADABLE = 10  # samples that may be skipped, or 1 % of the data set if that is more


def record_unreadable_sample(known: dict[int, str], dataset: Any, index: int, reason: str) -> None:
    """Add a skipped sample to those known.

    Raises:
        DataError: more samples are unreadable than may be skipped.
    """
    known[index] = f"{name_of(dataset, index)}: {reason}"
    check_number_of_unreadable(known, dataset, known[index])


def check_number_of_unreadable(known: Mapping[int, str], dataset: Any, text: str) -> None:
    """Raise `DataError` if more samples are unreadable than may be skipped; `text` describes one of them."""
    limit = max(MAX_UNREADABLE, len(dataset) // 100)
    if len(known) > limit:
        raise DataError(
            f"{len(known)} of {len(dataset)} samples cannot be read, {limit} may be skipped; {text}",
            hint="repair or delete those files: trainkit.log lists them",
        )


def unreadable_sample_error(key: str, dataset: Any, index: int, reason: str) -> DataError:
    """Return the error for a sample of `key` that cannot be read and may not be skipped."""
    hint = "repair or delete it, or skip such samples: data.on_unreadable=skip"
    return DataError(f"{key}: {name_of(dataset, index)}: {reason}{_reader_of(dataset)}", hint=hint)


def unreadable_set_error(key: str, dataset: Any, index: int, reason: str) -> DataError:
    """Return the error for a data set without a readable sample."""
    sample = f"{name_of(dataset, index)}: {reason}{_reader_of(dataset)}"
    return DataError(f"{key}: no sample can be read: the first is {sample}", hint="repair the files of the data set")


def _reader_of(dataset: Any) -> str:
    """Return which `__getitem__` reads the samples, if it is code of the user."""
    base = base_of(dataset)
    if type(base).__module__.partition(".")[0] in ("torch", "torchvision", "trainkit"):
        return ""
    return f" in __getitem__ of {name_and_place(type(base), '__getitem__')}"


def unreadable_batch_error(known: Mapping[int, str]) -> DataError:
    """Return the error for a batch without a readable sample."""
    example = f", such as {list(known.values())[-1]}" if known else ""
    return DataError(
        f"no sample of a batch can be read{example}",
        hint="repair the files, or write a larger batch_size, so that each batch has readable samples",
    )

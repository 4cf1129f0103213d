"""Streams: data sets that are read in their own order with `__iter__`, because they have no samples by index."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place

SHARDING_PACKAGES = ("datasets", "webdataset")  # their sets divide their samples among the workers of a DataLoader
SCALARS = (bool, int, float, complex, str, bytes)  # that a checkpoint holds as they are


class StreamStateError(ValueError):
    """The `state_dict` of a stream contains a value that a checkpoint cannot hold."""


def is_stream(dataset: Any) -> bool:
    """Return whether a data set has `__iter__`, and no samples by index."""
    kind = type(dataset)
    if isinstance(dataset, IterableDataset):
        return True
    if not hasattr(kind, "__iter__"):
        return False
    has_items = getattr(kind, "__getitem__", None) not in (None, Dataset.__getitem__)
    return not (has_items and hasattr(kind, "__len__"))


def reading_method(dataset: Any) -> str:
    """Return the name of the method that reads the samples of a data set."""
    return "__iter__" if is_stream(dataset) else "__getitem__"


@dataclass(frozen=True)
class Stream:
    """A data set without samples by index.

    Attributes:
        dataset: the data set. It stays as the config built it, because each pass reads a copy.
        key: the config key of the data set, for messages.
        length: the value of `__len__`; None: the data set has no `__len__`.
    """

    dataset: Any
    key: str
    length: int | None

    @property
    def shards_itself(self) -> bool:
        """Whether the set gives each worker a share of its samples. Otherwise each worker reads all samples."""
        package = type(self.dataset).__module__.partition(".")[0]
        return bool(getattr(self.dataset, "shards_itself", package in SHARDING_PACKAGES))

    @property
    def reason_to_reread(self) -> str | None:
        """Why a resume reads the used samples again; None: it continues from the state of the set."""
        if not all(callable(getattr(self.dataset, name, None)) for name in ("state_dict", "load_state_dict")):
            return "it has no state_dict"
        return "its state_dict leaves out the shuffle buffer" if _has_shuffle_buffer(self.dataset) else None

    @property
    def name(self) -> str:
        """The class of the set, and the place of its `__iter__`."""
        return name_and_place(type(self.dataset), "__iter__")

    def copy(self) -> Any:
        """Return a copy of the set, so that a pass does not change what the next pass reads.

        Raises:
            ConfigError: the set cannot be copied.
        """
        try:
            return copy.deepcopy(self.dataset)
        except Exception as error:
            cause = f"{self.key}: {self.name} cannot be copied, and each pass reads a copy"
            hint = "open files and make generators in __iter__, not in __init__"
            raise ConfigError(f"{cause}: {type(error).__name__}: {error}", hint=hint) from error


def begin_pass(dataset: Any, pass_number: int) -> None:
    """Give a set the number of its pass, from 0, if its order can depend on the pass."""
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(pass_number)
    for stage in getattr(dataset, "pipeline", ()):
        if type(stage).__name__ == "detshuffle":  # a stage of webdataset, which adds 1 when it starts
            stage.epoch = pass_number - 1


def _has_shuffle_buffer(dataset: Any) -> bool:
    """Return whether a set of Hugging Face shuffles in a buffer, which its state does not contain."""
    stages = [getattr(dataset, "_ex_iterable", None)]
    while stages:
        stage = stages.pop()
        if type(stage).__name__ == "BufferShuffledExamplesIterable":
            return True
        before = getattr(stage, "ex_iterable", None)
        stages += [] if before is None else [before]
        stages += getattr(stage, "ex_iterables", None) or []
    return False


def plain_copy(value: Any, place: str = "state_dict") -> Any:
    """Return a copy of a state, which may consist of numbers, strings, tensors, lists, tuples and dicts.

    Raises:
        StreamStateError: the state contains another value.
    """
    if value is None or type(value) in SCALARS:
        return value
    if type(value) is dict or isinstance(value, Mapping):
        return {plain_copy(key, place): plain_copy(item, f"{place}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_copy(item, place) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    raise StreamStateError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold")

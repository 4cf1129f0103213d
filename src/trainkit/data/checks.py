"""Checks of a data set before it is read: it has items and a length."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, IterableDataset

from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place


def check_dataset(dataset: Any, key: str) -> None:
    """Check that samples can be read by their index, and that the data set has a length.

    Args:
        dataset: the object that the config key built.
        key: the config key, such as `data.train`.

    Raises:
        ConfigError: the data set has no `__getitem__`, no `__len__`, or a `__len__` that raises an error.
    """
    name = name_and_place(type(dataset), method="")
    getitem = getattr(type(dataset), "__getitem__", None) or getattr(dataset, "__getitem__", None)
    if getitem in (None, Dataset.__getitem__):  # torch's own method only raises an error
        stream = ": it is an IterableDataset" if isinstance(dataset, IterableDataset) else ""
        raise ConfigError(
            f"{key}: {name} has no __getitem__(index){stream}, and trainkit reads samples by their index",
            hint="write __len__, and a __getitem__(index) that returns a pair (inputs, target)",
        )
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{key}: {name} has no __len__, and trainkit needs the number of samples",
            hint="write __len__, which returns the number of samples",
        )
    try:
        len(dataset)
    except Exception as error:
        raise ConfigError(
            f"{key}: __len__ of {name_and_place(type(dataset), '__len__')} raises {type(error).__name__}: {error}",
            hint="return the number of samples from __len__, as an int",
        ) from error

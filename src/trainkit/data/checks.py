"""Checks of a data set before it is read: it has items and a length, or it is a stream."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place
from trainkit.data.streams import is_stream


def check_dataset(dataset: Any, key: str) -> None:
    """Check that samples can be read by their index and the data set has a length, or that it is a stream.

    Args:
        dataset: the object that the config key built.
        key: the config key, such as `data.train`.

    Raises:
        ConfigError: the data set has no `__getitem__`, no `__len__`, or a `__len__` that raises an error; or it can
            be read only once.
    """
    name = name_and_place(type(dataset), method="")
    if hasattr(type(dataset), "__next__"):
        cause = f"{key}: {name} is an iterator, which can be read only once"
        raise ConfigError(cause, hint="write a class whose __iter__ yields the samples, and makes the iterator anew")
    if is_stream(dataset):
        length_of_stream(dataset, key)
        return
    getitem = getattr(type(dataset), "__getitem__", None) or getattr(dataset, "__getitem__", None)
    if getitem in (None, Dataset.__getitem__):  # torch's own method only raises an error
        raise ConfigError(
            f"{key}: {name} has no __getitem__(index) and no __iter__, so no samples can be read",
            hint="write __len__, and a __getitem__(index) that returns a pair (inputs, target); "
            "or an __iter__ that yields pairs",
        )
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{key}: {name} has no __len__, and trainkit needs the number of samples",
            hint="write __len__, which returns the number of samples",
        )
    length_of(dataset, key)


def length_of(dataset: Any, key: str) -> int:
    """Return the length of a data set.

    Raises:
        ConfigError: `__len__` raises an error.
    """
    try:
        return len(dataset)
    except Exception as error:
        raise ConfigError(
            f"{key}: __len__ of {name_and_place(type(dataset), '__len__')} raises {type(error).__name__}: {error}",
            hint="return the number of samples from __len__, as an int",
        ) from error


def length_of_stream(dataset: Any, key: str) -> int | None:
    """Return the length of a stream; None if it has no `__len__`, or one that raises `TypeError` as in torch's classes.

    Raises:
        ConfigError: `__len__` raises another error.
    """
    if not hasattr(type(dataset), "__len__"):
        return None
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None
    except Exception:
        return length_of(dataset, key)

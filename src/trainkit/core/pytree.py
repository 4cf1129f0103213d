"""Samples and batches as data sets give them: a tensor, or tuples, lists and mappings of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from trainkit.core.errors import DataError


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with every tensor in it changed: a tensor, or tuples, lists and mappings of them."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def leaves(batch: Any) -> Iterator[Any]:
    """What lies in the tuples, lists and mappings of a batch, in their order."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple | list):
        for part in batch:
            yield from leaves(part)
    else:
        yield batch


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in its order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def structure_of(sample: Any) -> Any:
    """What a sample is made of: its containers, a mapping's keys in their order, shapes and types."""
    if isinstance(sample, Mapping):
        return tuple((key, structure_of(value)) for key, value in sample.items())
    if isinstance(sample, tuple | list):
        return [structure_of(value) for value in sample]
    if hasattr(sample, "shape"):
        return f"{tuple(sample.shape)} {sample.dtype}".replace("torch.", "")
    return f"{sample.mode} {sample.size}" if hasattr(sample, "getbands") else type(sample).__name__  # an image of PIL


def batch_size_of(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor.

    Raises:
        DataError: there is no tensor in it.
    """
    first = next(iter(tensors_in(batch)), None)
    if first is None:
        raise DataError(f"the inputs are {type(batch).__name__}, with no tensor in them", hint="give tensors")
    return len(first) if first.dim() else 1


def shape_of(batch: Any) -> str:
    """A batch's shape and type, for messages."""
    return f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__

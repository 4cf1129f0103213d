"""Samples and batches: a tensor, or nested tuples, lists and mappings of tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.core.errors import DataError


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch of the same structure with `change` applied to every tensor."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def leaves(batch: Any) -> Iterator[Any]:
    """Yield the values in the nested tuples, lists and mappings of a batch, in order."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple | list):
        for part in batch:
            yield from leaves(part)
    else:
        yield batch


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def structure_of(sample: Any) -> Any:
    """Return the structure of a sample, which can be compared: containers, keys in order, shapes and dtypes."""
    if isinstance(sample, Mapping):
        return tuple((key, structure_of(value)) for key, value in sample.items())
    if isinstance(sample, tuple | list):
        return [structure_of(value) for value in sample]
    if hasattr(sample, "shape"):
        return f"{tuple(sample.shape)} {sample.dtype}".replace("torch.", "")
    return f"{sample.mode} {sample.size}" if hasattr(sample, "getbands") else type(sample).__name__  # a PIL image


def take_rows_of_samples(batch: Any, samples: int, start: int, stop: int) -> Any:
    """Return the rows of the samples from `start` to `stop`, of tensors with a multiple of `samples` rows.

    Raises:
        ValueError: the rows of a tensor are not a multiple of `samples`.
    """
    if any(not tensor.dim() or len(tensor) % samples for tensor in tensors_in(batch)):
        raise ValueError(f"the rows are not a multiple of {samples} samples")
    return map_tensors(batch, lambda t: t[start * (len(t) // samples) : stop * (len(t) // samples)])


def join_rows(parts: Sequence[Any]) -> Any:
    """Return the parts of a batch as one batch.

    Raises:
        ValueError: the parts have no rows, or differ in structure.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if any(not isinstance(p, Tensor) or not p.dim() or p.shape[1:] != first.shape[1:] for p in parts):
            raise ValueError("tensors without rows, or of different shapes")
        return torch.cat([*parts])
    if type(first) is dict:
        return {key: join_rows([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        joined = [join_rows(values) for values in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if first is None:
        return None
    raise ValueError(f"{type(first).__name__} has no rows")


def batch_size_of(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor.

    Raises:
        DataError: the batch does not contain a tensor.
    """
    first = next(iter(tensors_in(batch)), None)
    if first is None:
        raise DataError(
            f"the inputs ({type(batch).__name__}) do not contain a tensor", hint="return tensors from the data set"
        )
    return len(first) if first.dim() else 1


def describe(batch: Any) -> str:
    """Return the shape and dtype of a tensor, or the type and the parts of another value, for messages."""
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {batch.dtype}".replace("torch.", "")
    kind = type(batch).__name__
    kind = f"{'an' if kind[:1] in 'aeiouAEIOU' else 'a'} {kind}"
    if isinstance(batch, Mapping):
        parts = [f"{key}: {describe(value)}" for key, value in batch.items()]
    elif isinstance(batch, tuple | list):
        parts = list(dict.fromkeys(map(describe, batch)))
        kind = f"{kind} of {len(batch)}"
    else:
        return repr(batch) if isinstance(batch, str | int | float) and len(repr(batch)) < 30 else kind
    shown = ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
    return f"{kind} ({shown})"


def copy_to_cpu(state: Any) -> Any:
    """Copy a state with its tensors to the CPU, so that later training steps do not change it."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, OrderedDict):  # a module's state_dict, whose `_metadata` holds the layer versions
        copied = OrderedDict((key, copy_to_cpu(value)) for key, value in state.items())
        copied.__dict__.update(state.__dict__)
        return copied
    if isinstance(state, Mapping):
        return {key: copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copy_to_cpu(value) for value in state)
    return state

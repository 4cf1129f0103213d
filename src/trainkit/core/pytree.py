"""Samples and batches: a tensor, or nested tuples, lists and mappings of tensors."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.core.errors import DataError


class Samples(list[Any]):
    """A batch with one entry per sample, for samples that do not fit into one tensor."""


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


def map_batches(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with `change` applied to every tensor; a tensor of a single sample gets dimension 0 for it."""

    def change_sample(tensor: Tensor) -> Tensor:
        return change(tensor[None])[0]

    if isinstance(batch, Samples):
        return map_tensors(batch, change_sample)
    if isinstance(batch, Mapping):
        return {key: map_batches(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_batches(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return change(batch) if isinstance(batch, Tensor) else batch


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
    if isinstance(first, Samples):
        return Samples(itertools.chain(*parts))
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
    """Return the number of samples in a batch.

    This is the first dimension of its first tensor, or the length of its first `Samples`. Without either, it is the
    length of the first list of other values, such as strings.

    Raises:
        DataError: the batch contains none of these.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.shape else 1
    sizes = [*_sizes(batch, lists=False), *_sizes(batch, lists=True)]
    if not sizes:
        raise DataError(
            f"the inputs ({type(batch).__name__}) do not contain a tensor", hint="return tensors from the data set"
        )
    return sizes[0]


def _sizes(batch: Any, *, lists: bool) -> Iterator[int]:
    """Yield the sizes of the tensors and `Samples` in a batch, or of its lists of other values."""
    if isinstance(batch, Samples) or (lists and is_list_of_values(batch)):
        yield len(batch)
    elif isinstance(batch, Tensor) and not lists:
        yield len(batch) if batch.dim() else 1
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _sizes(part, lists=lists)


def is_list_of_values(batch: Any) -> bool:
    """Return whether a batch is a list or a tuple of values such as strings, without tensors and containers."""
    if not isinstance(batch, list | tuple) or hasattr(batch, "_fields") or not batch:
        return False
    return not any(isinstance(value, Tensor | Mapping | list | tuple) for value in batch)


def take_samples(batch: Any, start: int, stop: int, samples: int) -> Any:
    """Return the samples from `start` to `stop` of a batch.

    Tensors and `Samples` are sliced, and so is a list of `samples` values such as strings. Other values stay.
    """
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Samples):
        return Samples(batch[start:stop])
    if isinstance(batch, Mapping):
        return {key: take_samples(value, start, stop, samples) for key, value in batch.items()}
    if is_list_of_values(batch) and len(batch) == samples:
        return batch[start:stop]
    if isinstance(batch, tuple | list):
        values = [take_samples(value, start, stop, samples) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype of a tensor as text, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


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


def copy_to_cpu(state: Any, shared: dict[Any, Tensor] | None = None) -> Any:
    """Copy a state with its tensors to the CPU, so that later training steps do not change it.

    Args:
        state: nested containers.
        shared: an empty dict; then tensors that share their memory, such as tied weights, have one copy.
    """
    if isinstance(state, Tensor):
        return _copy_tensor(state, shared)
    if isinstance(state, OrderedDict):  # a module's state_dict, whose `_metadata` holds the layer versions
        copied = OrderedDict((key, copy_to_cpu(value, shared)) for key, value in state.items())
        copied.__dict__.update(state.__dict__)
        return copied
    if isinstance(state, Mapping):
        return {key: copy_to_cpu(value, shared) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copy_to_cpu(value, shared) for value in state)
    return state


def _copy_tensor(tensor: Tensor, shared: dict[Any, Tensor] | None) -> Tensor:
    if shared is None or tensor.layout != torch.strided or not tensor.numel():
        return tensor.detach().to("cpu", copy=True)
    key = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    if key not in shared:
        shared[key] = tensor.detach().to("cpu", copy=True)
    return shared[key]

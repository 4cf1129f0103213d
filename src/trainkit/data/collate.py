"""Make a batch of samples: as torch does, with padding, or as lists with one entry per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from trainkit.core.pytree import Samples, describe

COLLATED = (Tensor, np.ndarray, np.generic, bool, int, float, complex, str, bytes)  # types that torch collates
COLLATED_TYPES = frozenset(COLLATED)


def as_tensors(part: Any) -> Any:
    """Return a sample with its PIL images as uint8 tensors (C, H, W)."""
    if isinstance(part, COLLATED):
        return part
    if hasattr(part, "getbands"):  # a PIL image, recognised without importing PIL
        pixels = torch.from_numpy(np.array(part))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    if isinstance(part, Mapping):
        return {key: as_tensors(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        values = list_as_tensors(part)
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    return part


def list_as_tensors(samples: Sequence[Any]) -> list[Any]:
    """Return the list of `as_tensors` of each sample."""
    if COLLATED_TYPES.issuperset(map(type, samples)):
        return [*samples]
    return [sample if isinstance(sample, COLLATED) else as_tensors(sample) for sample in samples]


def stack(samples: list[Any]) -> Any:
    """Return samples as a batch, as torch's `default_collate` does; values of other types become a list."""
    other_types = {type(value) for value in _values(samples[0]) if not isinstance(value, COLLATED)}
    functions: dict[Any, Any] = {**default_collate_fn_map, **dict.fromkeys(other_types, _as_list)}
    return collate_by_type(samples, collate_fn_map=functions)


def _values(sample: Any) -> list[Any]:
    """Return the values in the mappings, tuples and lists of a sample."""
    if isinstance(sample, Mapping):
        sample = [*sample.values()]
    if isinstance(sample, tuple | list):
        return [value for part in sample for value in _values(part)]
    return [sample]


def _as_list(values: Any, **_: Any) -> list[Any]:
    return [*values]


# -------------------------------------------------------------------------------------- `lists`


def lists(samples: list[Any]) -> Any:
    """Return a batch that keeps one entry per sample, in `Samples`; numbers become one tensor.

    A batch of mappings is a mapping of `Samples`, and a batch of tuples is a tuple of `Samples`.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: lists([_item(sample, key) for sample in samples]) for key in first}
    if isinstance(first, tuple):
        _require_length(samples)
        parts = [lists([sample[place] for sample in samples]) for place in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if all(isinstance(sample, int | float | np.number) for sample in samples):
        return _numbers(samples)
    return Samples(map(_entry, samples))


def _entry(sample: Any) -> Any:
    """Return an entry of `Samples`: arrays, lists of numbers and images become tensors."""
    sample = as_tensors(sample)
    if isinstance(sample, np.ndarray) or _is_sequence_of_numbers(sample):
        return torch.as_tensor(np.asarray(sample)) if isinstance(sample, np.ndarray) else torch.tensor(sample)
    if isinstance(sample, Mapping):
        return {key: _entry(value) for key, value in sample.items()}
    return type(sample)(map(_entry, sample)) if type(sample) in (tuple, list) else sample


# ---------------------------------------------------------------------------------------- `pad`


class Pad:
    """Pads the sequences of samples at their ends, to the longest sequence of the batch.

    Tensors, arrays and lists of numbers are padded in every dimension. Numbers become a tensor, and other values such
    as strings become a list.

    Args:
        value: the padding value.
        values: other padding values for some keys of a mapping, or positions of a tuple: `{labels: -100}`.
        lengths: the key under which a batch of mappings gets the lengths before the padding, (N,) int64. The length
            of a sample is the length of its first sequence. In a batch of pairs, the inputs become a tuple with the
            lengths.
    """

    def __init__(self, value: float = 0, values: Mapping[Any, float] | None = None, lengths: str | None = None) -> None:
        self.value, self.lengths = value, lengths
        self.values = {str(key): filler for key, filler in (values or {}).items()}

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch."""
        batch = self._pad(samples, self.value)
        if self.lengths is None:
            return batch
        lengths = torch.tensor([_length(sample) for sample in samples])
        if isinstance(batch, dict):
            return {**batch, self.lengths: lengths}
        if not isinstance(batch, tuple):
            raise ValueError(f"data.collate.lengths={self.lengths}: the samples are neither mappings nor pairs")
        inputs = batch[0]
        inputs = {**inputs, self.lengths: lengths} if isinstance(inputs, dict) else (inputs, lengths)
        return (inputs, *batch[1:])

    def _pad(self, samples: Sequence[Any], value: float) -> Any:
        first = samples[0]
        if isinstance(first, Mapping):
            return {key: self._pad([_item(s, key) for s in samples], self._value(key, value)) for key in first}
        if isinstance(first, Tensor | np.ndarray) or hasattr(first, "getbands") or _is_sequence_of_numbers(first):
            return pad_tensors([torch.as_tensor(as_tensors(sample)) for sample in samples], value)
        if isinstance(first, tuple | list):
            _require_length(samples)
            parts = [self._pad([s[i] for s in samples], self._value(i, value)) for i in range(len(first))]
            return tuple(parts)
        return _numbers(samples) if isinstance(first, int | float | np.number) else [*samples]

    def _value(self, key: Any, value: float) -> float:
        return self.values.get(str(key), value)


def pad_tensors(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Return tensors as one tensor. Each is padded at its end to the largest size in each dimension.

    Raises:
        ValueError: the tensors differ in their number of dimensions.
    """
    nonempty = [tensor for tensor in tensors if tensor.numel()] or [*tensors]  # the dtype of an empty list is unknown
    if len({tensor.dim() for tensor in nonempty}) > 1:
        one, other = nonempty[0], next(tensor for tensor in nonempty if tensor.dim() != nonempty[0].dim())
        raise ValueError(f"sequences {describe(one)} and {describe(other)} cannot be padded to one shape")
    sizes = [max(lengths) for lengths in zip(*(tensor.shape for tensor in nonempty), strict=True)]
    dtype = nonempty[0].dtype
    for tensor in nonempty:
        dtype = torch.promote_types(dtype, tensor.dtype)
    padded = torch.full((len(tensors), *sizes), value, dtype=dtype)
    for row, tensor in zip(padded, tensors, strict=True):
        if tensor.numel():
            row[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _numbers(samples: Sequence[Any]) -> Tensor:
    """Return numbers as a tensor: int64, or the default dtype for floats."""
    return torch.tensor([sample.item() if isinstance(sample, np.generic) else sample for sample in samples])


def _is_sequence_of_numbers(sample: Any) -> bool:
    """Return whether a sample is a list of numbers, or a list of such lists."""
    if not isinstance(sample, list):
        return False
    return all(isinstance(value, int | float | np.number) or _is_sequence_of_numbers(value) for value in sample)


def _length(sample: Any) -> int:
    """Return the length of the first sequence in a sample; -1 if it has no sequence."""
    if isinstance(sample, Mapping):
        sample = tuple(sample.values())
    if isinstance(sample, tuple) or (isinstance(sample, list) and not _is_sequence_of_numbers(sample)):
        return next((length for length in map(_length, sample) if length >= 0), -1)
    if isinstance(sample, Tensor | np.ndarray) and sample.ndim == 0:
        return -1
    return len(sample) if isinstance(sample, Tensor | np.ndarray | list) else -1


def _item(sample: Any, key: Any) -> Any:
    if not isinstance(sample, Mapping) or key not in sample:
        raise ValueError(f"a sample has no key {key!r}, which the first sample of the batch has")
    return sample[key]


def _require_length(samples: Sequence[Any]) -> None:
    lengths = sorted({len(sample) for sample in samples})
    if len(lengths) > 1:
        raise ValueError(f"the samples of a batch have {lengths[0]} and {lengths[-1]} values")

"""Pairs (inputs, targets) in which the targets may be the inputs, as for an autoencoder.

In such a pair both parts are the same object. The functions here keep that identity, so that the tensors are stored
and changed once.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from trainkit.core.pytree import map_tensors, tensors_in

Pair = tuple[Any, Any]


def target_is_inputs(sample: Any) -> bool:
    """Return whether a sample's target is its inputs: the same object, or a tensor in the same memory.

    Numbers and texts do not count, because Python uses one object for some equal numbers and texts.
    """
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        return False
    inputs, target = sample
    if target is inputs:
        return not isinstance(inputs, Number | str | bytes | None)
    if not (isinstance(inputs, Tensor) and isinstance(target, Tensor)):
        return False
    if inputs.shape != target.shape or inputs.dtype != target.dtype or inputs.device != target.device:
        return False
    return inputs.layout == target.layout == torch.strided and inputs.is_set_to(target)


def map_pair(pair: Pair, change: Callable[[Tensor], Tensor]) -> Pair:
    """Return a pair with `change` applied to every tensor, once if the targets are the inputs."""
    inputs, targets = pair
    changed = map_tensors(inputs, change)
    return changed, changed if targets is inputs else map_tensors(targets, change)


def tensors_in_pair(pair: Pair | None) -> list[Tensor]:
    """Return the tensors of a pair, in order; those of the inputs alone if the targets are the inputs."""
    return [] if pair is None else tensors_in(pair[0] if pair[1] is pair[0] else pair)

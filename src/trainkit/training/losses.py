"""What a loss value is a mean over: the denominator that makes an epoch's mean exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sum(loss_fn: nn.Module) -> bool:
    """Whether a loss value is a sum over the batch, and so needs no weighting."""
    return getattr(loss_fn, "reduction", None) == "sum"


def denominator(loss_fn: nn.Module, targets: Tensor, samples: int) -> Tensor | int:
    """What torch divided the sum of the per-sample losses by to get a batch's loss value.

    The number of samples, but for `CrossEntropyLoss` and `NLLLoss` with class targets: there the
    targets that are not `ignore_index`, each counted by its class weight (torch's documentation of
    both). A loss of one's own that divides by something else says so in a method
    `denominator(targets)`.

    Args:
        loss_fn: the loss.
        targets: the batch's targets, of any shape.
        samples: how many samples the batch holds.

    Returns:
        A number, or a scalar tensor on the device of `targets` (reading it would make the device wait).
    """
    own = getattr(loss_fn, "denominator", None)
    if callable(own):
        result: Tensor | int = own(targets)
        return result
    if is_sum(loss_fn) or not isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
        return samples
    if targets.is_floating_point():  # class probabilities: torch divides by their number alone
        return samples * targets[0, 0].numel()
    counted = targets != loss_fn.ignore_index
    if loss_fn.weight is None:
        return counted.sum()
    weights = loss_fn.weight[torch.where(counted, targets, 0)]
    return torch.where(counted, weights, 0).sum()


def knows_sum(loss_fn: nn.Module) -> bool:
    """Whether a loss is a mean that can give its sum instead: torch's own cross entropies."""
    forward = type(loss_fn).forward
    return (
        isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        and forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
        and loss_fn.reduction == "mean"
        and getattr(loss_fn, "denominator", None) is None
    )


@contextmanager
def summing(loss_fn: nn.Module) -> Iterator[bool]:
    """Let cross entropy give its sum for a while; tells whether a loss value is a sum now.

    A part of a batch may hold nothing that counts: its mean is 0 / 0, its sum 0.
    """
    if not knows_sum(loss_fn):
        yield False
        return
    known: Any = loss_fn
    known.reduction = "sum"
    try:
        yield True
    finally:
        known.reduction = "mean"

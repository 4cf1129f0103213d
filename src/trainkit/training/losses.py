"""The denominator of a loss: what its value is a mean over, which makes an epoch's mean exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sum(loss_fn: nn.Module) -> bool:
    """Return whether a loss value is a sum over the batch, which needs no weight."""
    return getattr(loss_fn, "reduction", None) == "sum"


def denominator(loss_fn: nn.Module, targets: Tensor, samples: int) -> Tensor | int:
    """Return the number by which torch divided the sum of the per-sample losses.

    For `CrossEntropyLoss` and `NLLLoss` with class targets this is the number of targets that are not
    `ignore_index`, each weighted by its class weight (see torch's documentation of both). For other losses it is
    the number of samples. A custom loss that divides by another number defines a method `denominator(targets)`.

    Args:
        loss_fn: the loss.
        targets: the batch's targets, of any shape.
        samples: the number of samples in the batch.

    Returns:
        A number, or a scalar tensor on the device of `targets` (to read it would synchronize the device).
    """
    custom = getattr(loss_fn, "denominator", None)
    if callable(custom):
        result: Tensor | int = custom(targets)
        return result
    if is_sum(loss_fn) or not isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
        return samples
    if targets.is_floating_point():  # for class probabilities, torch divides by their number
        return samples * targets[0, 0].numel()
    counted = targets != loss_fn.ignore_index
    if loss_fn.weight is None:
        return counted.sum()
    weights = loss_fn.weight[torch.where(counted, targets, 0)]
    return torch.where(counted, weights, 0).sum()


def supports_sum(loss_fn: nn.Module) -> bool:
    """Return whether a mean loss can return its sum instead: torch's cross entropies can."""
    forward = type(loss_fn).forward
    return (
        isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        and forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
        and loss_fn.reduction == "mean"
        and getattr(loss_fn, "denominator", None) is None
    )


@contextmanager
def sum_reduction(loss_fn: nn.Module) -> Iterator[bool]:
    """Let a loss return its sum inside the block; yield whether the loss supports this.

    A micro batch may have ignored targets only. Its mean is 0 / 0, its sum is 0.
    """
    if not supports_sum(loss_fn):
        yield False
        return
    loss: Any = loss_fn
    loss.reduction = "sum"
    try:
        yield True
    finally:
        loss.reduction = "mean"

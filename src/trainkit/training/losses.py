"""The denominator of a loss, which makes an epoch's mean exact, and whether its batch may be split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
FEW = 1024  # targets on the CPU that Python counts faster than tensor operations, which take 2% of a small step


def whole_batch_module(model: nn.Module, loss_fn: nn.Module) -> nn.Module | None:
    """Return the module in the loss or the model whose batches may not be split.

    It declares `whole_batch = True`, or carries state from batch to batch (`reset_state`).
    """
    modules = (*loss_fn.modules(), *model.modules())
    return next((module for module in modules if why_whole_batch(module)), None)


def why_whole_batch(module: nn.Module) -> str:
    """Return why the batches of a module may not be split, for messages; '' if they may."""
    if getattr(module, "whole_batch", None) is True:
        return "has whole_batch = True"
    return "carries state from batch to batch" if callable(getattr(module, "reset_state", None)) else ""


def is_sum(loss_fn: nn.Module) -> bool:
    """Return whether a loss value is a sum over the batch, which needs no weight."""
    return getattr(loss_fn, "reduction", None) == "sum"


def denominator(loss_fn: nn.Module, targets: Any, samples: int) -> Tensor | int:
    """Return the number by which torch divided the sum of the per-sample losses.

    For `CrossEntropyLoss` and `NLLLoss` with class targets this is the number of targets that are not
    `ignore_index`, each weighted by its class weight (see torch's documentation of both). For other losses it is
    the number of samples. A custom loss that divides by another number defines a method `denominator(targets)`;
    a loss that sums over the batch has the attribute `reduction = "sum"`.

    Args:
        loss_fn: the loss.
        targets: the targets of the batch: a tensor for torch's losses.
        samples: the number of samples in the batch.

    Returns:
        A number, or a scalar tensor on the device of `targets` (to read it would synchronize the device).
    """
    is_torchs = type(loss_fn) in CLASS_LOSSES  # a module takes long to say that it lacks an attribute
    custom = vars(loss_fn).get("denominator") if is_torchs else getattr(loss_fn, "denominator", None)
    if custom is not None:
        result: Tensor | int = custom(targets)
        if isinstance(result, Tensor) and result.numel() != 1:
            raise ValueError(f"denominator(targets) returns {tuple(result.shape)}, expected one number")
        return result
    if is_sum(loss_fn) or not isinstance(loss_fn, CLASS_LOSSES):
        return samples
    if not isinstance(targets, Tensor):  # the loss itself refuses it
        return samples
    if targets.is_floating_point():  # for class probabilities, torch divides by their number
        return samples * targets[0, 0].numel() if targets.dim() > 1 else samples
    if loss_fn.weight is None and targets.is_cpu and targets.dim() == 1 and targets.numel() <= FEW:
        return targets.numel() - targets.tolist().count(loss_fn.ignore_index)
    counted = targets != loss_fn.ignore_index
    if loss_fn.weight is None:
        return counted.sum()
    weights = loss_fn.weight[torch.where(counted, targets, 0)]
    return torch.where(counted, weights, 0).sum()


def loss_contribution(
    loss_fn: nn.Module, outputs: Any, targets: Any, samples: int, batch_denominator: Tensor | float | None
) -> Tensor | None:
    """Return what a micro batch adds to the loss of its batch, or None if all of its targets are ignored.

    Args:
        loss_fn: the loss.
        outputs: the outputs for the micro batch.
        targets: the targets of the micro batch.
        samples: the number of samples in the micro batch.
        batch_denominator: the denominator of the whole batch; None: the micro batch is the whole batch.
    """
    if batch_denominator is None:
        loss: Tensor = loss_fn(outputs, targets)
        return loss
    own_denominator = denominator(loss_fn, targets, samples)
    # The mean over ignored targets only is 0 / 0. Only a custom loss synchronizes the device here.
    if not supports_sum(loss_fn) and not is_sum(loss_fn) and own_denominator == 0:
        return None
    with sum_reduction(loss_fn) as summed:
        loss = loss_fn(outputs, targets)
    if is_sum(loss_fn):
        return loss
    if not summed:
        loss = loss * own_denominator
    if isinstance(batch_denominator, Tensor):
        batch_denominator = torch.where(batch_denominator == 0, 1, batch_denominator)
    return loss / batch_denominator


def supports_sum(loss_fn: nn.Module) -> bool:
    """Return whether a mean loss can return its sum instead: torch's cross entropies can."""
    forward = type(loss_fn).forward
    return (
        isinstance(loss_fn, CLASS_LOSSES)
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

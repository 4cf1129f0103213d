"""Running means that are exact: sums in float64 on the device, read only when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Mean:
    """The mean of batch values, each weighted by what it is a mean over.

    Sums stay on the device, in float64 where it has it (Apple's GPUs do not); only `item` and `sum`
    wait for it. Nothing is filtered: a NaN that goes in comes out.

    Args:
        device: where the values come from.
        summed: the values are sums over their batches already, so they are added as they are.
    """

    def __init__(self, device: torch.device, *, summed: bool = False) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.summed = summed
        self.numerator = torch.zeros((), dtype=dtype, device=device)
        self.denominator = torch.zeros((), dtype=dtype, device=device)

    def update(self, value: Tensor, weight: Tensor | int) -> None:
        """Add a batch's scalar `value`, a mean over `weight` (samples, or what torch divided by)."""
        if self.numerator.device.type == "cpu":  # where nothing is waited for, and Python's floats are float64, too
            number, counted = value.item(), weight.item() if isinstance(weight, Tensor) else weight
            self.numerator += number if self.summed else number * counted if counted else 0.0
        elif self.summed:
            self.numerator += value.detach().to(self.numerator.dtype)
        else:
            product = value.detach().to(self.numerator.dtype) * weight
            # A mean over nothing is 0 / 0, and adds nothing to a sum.
            self.numerator += torch.where(weight == 0, 0.0, product) if isinstance(weight, Tensor) else product
        self.denominator += weight

    def sum(self) -> float:
        """The sum of value times weight."""
        return float(self.numerator.item())

    def item(self) -> float:
        """The weighted mean; NaN where nothing was added."""
        return float((self.numerator / self.denominator).item())


def predicted_right(loss_fn: nn.Module, outputs: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
    """How many predictions are right and out of how many, both scalars; None if that means nothing here.

    Classes (N, C, ...) are judged by the largest output, ignored targets left out; with binary cross
    entropy by the side of one half that a probability falls on.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if isinstance(loss_fn, nn.BCEWithLogitsLoss | nn.BCELoss):
        boundary = 0.0 if isinstance(loss_fn, nn.BCEWithLogitsLoss) else 0.5
        right = (outputs > boundary) == (targets > 0.5)
        return right.sum(), torch.ones_like(right).sum()
    if targets.is_floating_point():
        if not isinstance(loss_fn, nn.CrossEntropyLoss) or outputs.shape != targets.shape or outputs.dim() < 2:
            return None
        targets = targets.argmax(dim=1)
    if outputs.dim() != targets.dim() + 1 or outputs.dim() < 2 or outputs.shape[1] < 2:
        return None
    counted = targets != getattr(loss_fn, "ignore_index", -100)
    return ((outputs.argmax(dim=1) == targets) & counted).sum(), counted.sum()

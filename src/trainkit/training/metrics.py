"""Running means that are exact: sums in float64 on the device, read only when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Mean:
    """The mean of batch values, each weighted by what it is a mean over.

    On an accelerator the sums stay there, in float64 where it has it (Apple's GPUs do not), and only `item` and
    `sum` wait for it; on the CPU they are Python's floats. Nothing is filtered: a NaN that goes in comes out.

    Args:
        device: where the values come from.
        summed: the values are sums over their batches already, so they are added as they are.
    """

    numerator: Any  # a float on the CPU, else a scalar there
    denominator: Any

    def __init__(self, device: torch.device, *, summed: bool = False) -> None:
        self.device, self.summed = device, summed
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.put(0.0, 0.0)

    def update(self, value: Tensor, weight: Tensor | int) -> None:
        """Add a batch's scalar `value`, a mean over `weight` (samples, or what torch divided by)."""
        if self.device.type == "cpu":
            number, counted = value.item(), weight.item() if isinstance(weight, Tensor) else weight
            self.numerator += number if self.summed else number * counted if counted else 0.0
            self.denominator += counted
            return
        if self.summed:
            self.numerator += value.detach().to(self.dtype)
        else:
            product = value.detach().to(self.dtype) * weight
            # A mean over nothing is 0 / 0, and adds nothing to a sum.
            self.numerator += torch.where(weight == 0, 0.0, product) if isinstance(weight, Tensor) else product
        self.denominator += weight

    def put(self, numerator: Tensor | float, denominator: Tensor | float) -> None:
        """Begin with these sums."""
        if self.device.type == "cpu":
            self.numerator, self.denominator = float(numerator), float(denominator)
        else:
            self.numerator = torch.as_tensor(numerator).to(self.device, self.dtype, copy=True)
            self.denominator = torch.as_tensor(denominator).to(self.device, self.dtype, copy=True)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Numerator and denominator, scalars."""
        return torch.as_tensor(self.numerator, dtype=self.dtype), torch.as_tensor(self.denominator, dtype=self.dtype)

    def sum(self) -> float:
        """The sum of value times weight."""
        return float(self.numerator)

    def item(self) -> float:
        """The weighted mean; NaN where nothing was added."""
        numerator, denominator = self.sums()
        return float((numerator / denominator).item())


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

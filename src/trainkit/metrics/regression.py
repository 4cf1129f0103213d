"""Metrics of predicted numbers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainkit.metrics.base import Metric, high_precision, predictions_in


def pairs_in(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of the same shape, in high precision.

    Raises:
        ValueError: the shapes differ by more than dimensions of size 1.
    """
    outputs = predictions_in(outputs)
    if outputs.shape != targets.shape:
        if [n for n in outputs.shape[1:] if n != 1] != [n for n in targets.shape[1:] if n != 1]:
            shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
            raise ValueError(f"expected outputs and targets of the same shape, found {shapes}")
        targets = targets.reshape(outputs.shape)
    return high_precision(outputs), high_precision(targets)


class MAE(Metric):
    """The mean absolute error over all elements."""

    higher_is_better: ClassVar[bool | None] = False

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        outputs, targets = pairs_in(outputs, targets)
        self.add("errors", (outputs - targets).abs().sum())
        self.sums["count"] = self.sums.get("count", 0) + targets.numel()

    def compute(self) -> float:
        """Return the mean; NaN without elements."""
        return float(self.sums["errors"]) / (self.sums["count"] or math.nan) if self.sums else math.nan


class RMSE(Metric):
    """The square root of the mean squared error over all elements."""

    higher_is_better: ClassVar[bool | None] = False

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        outputs, targets = pairs_in(outputs, targets)
        self.add("errors", (outputs - targets).square().sum())
        self.sums["count"] = self.sums.get("count", 0) + targets.numel()

    def compute(self) -> float:
        """Return the root; NaN without elements."""
        return math.sqrt(float(self.sums["errors"]) / (self.sums["count"] or math.nan)) if self.sums else math.nan


class R2(Metric):
    """The coefficient of determination of each output, and their mean.

    The variance of the targets comes from the merged means and squared deviations of the batches, relative to the
    first target. A difference of sums of squares would lose its digits if the targets are far from 0.
    """

    higher_is_better: ClassVar[bool | None] = True

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        outputs, targets = (tensor.reshape(len(tensor), -1) for tensor in pairs_in(outputs, targets))
        if not len(targets):
            return
        self.add("errors", (outputs - targets).square().sum(dim=0))
        targets = targets - self.sums.setdefault("origin", targets[0]).to(targets.device)
        mean, deviations = targets.mean(dim=0), (targets - targets.mean(dim=0)).square().sum(dim=0)
        before, added = self.sums.get("count", 0), len(targets)
        if before:
            difference = mean - self.sums["mean"].to(mean.device)
            deviations = deviations + difference.square() * (before * added / (before + added))
            mean = self.sums["mean"].to(mean.device) + difference * (added / (before + added))
        self.sums["mean"], self.sums["count"] = mean, before + added
        self.add("deviations", deviations)

    def compute(self) -> float:
        """Return the mean over the outputs; NaN with fewer than two samples."""
        if self.sums.get("count", 0) < 2:
            return math.nan
        errors, deviations = self.sums["errors"].cpu(), self.sums["deviations"].cpu()
        explained = 1 - errors / deviations
        constant = torch.where(errors == 0, 1.0, 0.0).to(explained.dtype)  # as scikit-learn defines it
        return float(torch.where(deviations == 0, constant, explained).mean())

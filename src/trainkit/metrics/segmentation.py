"""Metrics of segmentation: outputs (N, C, H, W), targets (N, H, W)."""

from __future__ import annotations

from torch import Tensor

from trainkit.metrics.base import ratio
from trainkit.metrics.classification import F1, PerClass


class MeanIoU(PerClass):
    """The intersection over union of predicted and true pixels of each class."""

    def value(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Return intersection / union."""
        return ratio(hits, predicted + true - hits)


class Dice(F1):
    """The Dice score of the pixels of each class, which equals F1."""

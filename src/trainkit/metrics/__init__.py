"""Metrics that configs name. Each has `update(outputs, targets)`, `compute()` and `reset()`, as in torchmetrics.

The counts are int64 and the sums float64, on the device of the outputs, which `update` does not synchronize.
"""

from typing import Any

from trainkit.metrics.classification import (
    F1,
    Accuracy,
    BalancedAccuracy,
    ConfusionMatrix,
    Precision,
    Recall,
    TopK,
)
from trainkit.metrics.collected import Collected
from trainkit.metrics.language import BitsPerToken, Perplexity
from trainkit.metrics.regression import MAE, R2, RMSE
from trainkit.metrics.segmentation import Dice, MeanIoU

__all__ = [
    "F1",
    "MAE",
    "R2",
    "RMSE",
    "Accuracy",
    "BalancedAccuracy",
    "BitsPerToken",
    "Collected",
    "ConfusionMatrix",
    "Dice",
    "MeanIoU",
    "Perplexity",
    "Precision",
    "Recall",
    "TopK",
]


def __getattr__(name: str) -> Any:
    """Return what this module held in version 0.1.0, which is now in `trainkit.training.metrics`."""
    import importlib
    import warnings

    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("trainkit.training.metrics"), name)
    warnings.warn(f"trainkit.metrics.{name} has moved to trainkit.training.metrics", DeprecationWarning, stacklevel=2)
    return value

"""The confusion matrix and the numbers of each class, from the outputs of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.losses import FromModel
from trainkit.metrics.base import predictions_in
from trainkit.metrics.classification import F1, ConfusionMatrix, PerClass, Precision, Recall
from trainkit.training.metrics import count_correct

MAX_MATRIX = 1000  # classes of a confusion matrix
MEASURES: dict[str, type[PerClass]] = {"precision": Precision, "recall": Recall, "f1": F1}


class ClassCounts:
    """Counts true and predicted classes: outputs (N, C) with class numbers (N,), or single logits with targets 0 and 1.

    Other outputs and targets have no such counts.

    Args:
        loss_fn: the loss, which says whether the outputs are classes, and which targets do not count.
        classes: the number of classes in the data; None: unknown.
        is_custom: whether a custom evaluation step returns the outputs.
    """

    def __init__(self, loss_fn: nn.Module, classes: int | None, *, is_custom: bool = False) -> None:
        self.loss_fn, self.classes, self.is_custom = loss_fn, classes, is_custom
        self.are_classes = True
        is_probability = isinstance(loss_fn, nn.BCELoss)
        options: Any = {"ignore_index": getattr(loss_fn, "ignore_index", -100), "threshold": 0.5 * is_probability}
        self.counts, self.matrix = F1("none", **options), ConfusionMatrix(**options)

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a micro batch."""
        pair = self._pair(outputs, targets) if self.are_classes else None
        self.are_classes = pair is not None
        if pair is not None:
            self.counts.update(*pair)
            if pair[0].dim() == 1 or pair[0].shape[1] <= MAX_MATRIX:
                self.matrix.update(*pair)

    def _pair(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
        """Return outputs and targets of classes; None if they are not."""
        if isinstance(self.loss_fn, FromModel) and not self.is_custom:
            outputs, targets = self.loss_fn.class_outputs(outputs, targets)
        try:
            outputs = predictions_in(outputs)
        except TypeError:
            return None
        if not isinstance(targets, Tensor) or not len(targets):
            return None
        if isinstance(self.loss_fn, nn.BCEWithLogitsLoss | nn.BCELoss) and not self.is_custom:
            is_binary = outputs.numel() == targets.numel() == len(targets)
            are_labels = is_binary and bool(((targets == 0) | (targets == 1)).all())
            return (outputs.reshape(-1), targets.reshape(-1)) if are_labels else None
        if outputs.dim() != 2 or outputs.shape[1] < 2 or targets.shape != outputs.shape[:1]:
            return None
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            return None
        if self.is_custom:
            counts = outputs.shape[1] == self.classes
        else:
            plain = None if isinstance(self.loss_fn, FromModel) else self.loss_fn
            counts = plain is None or count_correct(plain, outputs, targets, self.classes) is not None
        is_class = (targets >= 0) & (targets < outputs.shape[1]) | (targets == self.counts.ignore_index)
        return (outputs, targets) if counts and bool(is_class.all()) else None

    def compute(self, names: Sequence[str] | None = None) -> dict[str, Any] | None:
        """Return the numbers of each class, their averages and the confusion matrix; None if there are no classes.

        Args:
            names: of the classes; None: their numbers.
        """
        if not self.are_classes or not self.counts.sums:
            return None
        hits, predicted, true = (row.tolist() for row in self.counts.sums["counts"].cpu())
        total = sum(true)
        if names is None or len(names) != len(true):
            names = list(map(str, range(len(true))))
        values: dict[str, Any] = {name: _measure(kind, "none", self.counts) for name, kind in MEASURES.items()}
        # A sample is right for a class if it is of the class and predicted so, or neither.
        values["accuracy"] = [
            (total - t - p + 2 * h) / total if total else float("nan")
            for h, p, t in zip(hits, predicted, true, strict=True)
        ]
        rows = [
            {"class": name, "samples": true[index], **{key: column[index] for key, column in values.items()}}
            for index, name in enumerate(names)
        ]
        macro = {name: _measure(kind, "macro", self.counts) for name, kind in MEASURES.items()}
        weighted = {
            name: sum(value * n for value, n in zip(values[name], true, strict=True) if n) / total if total else None
            for name in MEASURES
        }
        matrix = self.matrix.compute() or None
        return {"classes": rows, "macro": macro, "weighted": weighted, "confusion_matrix": matrix}


def _measure(kind: type[PerClass], average: str, counts: PerClass) -> Any:
    """Return a measure of each class, or its average, from counts of hits, predictions and targets."""
    measure = kind(average)
    measure.sums = counts.sums
    return measure.compute()

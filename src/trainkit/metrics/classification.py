"""Metrics of predicted classes, from counts of true and predicted classes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainkit.metrics.base import Metric, classes_first, predictions_in, ratio

AVERAGES = ("macro", "micro", "binary", "none")


class ClassMetric(Metric):
    """A metric of predicted classes.

    Outputs (N, C, ...) predict the class with the largest output. Targets are class numbers, or probabilities of the
    shape of the outputs. Single outputs (N,) or (N, 1, ...) are logits of the classes 0 and 1.

    Args:
        ignore_index: targets of this class do not count.
        threshold: single outputs above it predict class 1; 0.5 if the outputs are probabilities.
        multilabel: the outputs are a logit for each of several labels, with targets 0 or 1 of the same shape.
    """

    higher_is_better: ClassVar[bool | None] = True

    def __init__(self, *, ignore_index: int = -100, threshold: float = 0.0, multilabel: bool = False) -> None:
        super().__init__()
        self.ignore_index, self.threshold, self.multilabel = ignore_index, threshold, multilabel

    def classes_in(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return predicted classes, true classes and whether they count, all flat, and the number of classes."""
        outputs = predictions_in(outputs)
        is_single = outputs.dim() == 1 or outputs.shape[1] == 1
        if is_single:
            if outputs.numel() != targets.numel():
                shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
                raise ValueError(f"expected a target for each output, found {shapes}")
            targets = targets.reshape(-1)
            counted = targets != self.ignore_index
            return (outputs.reshape(-1) > self.threshold).long(), (targets > 0.5).long(), counted, 2
        if targets.is_floating_point() and targets.shape == outputs.shape:
            targets = targets.argmax(dim=1)
        outputs, targets = classes_first(outputs, targets), targets.long()
        return (
            outputs.argmax(dim=1).reshape(-1),
            targets.reshape(-1),
            (targets != self.ignore_index).reshape(-1),
            (outputs.shape[1]),
        )


def count_classes(classes: Tensor, counted: Tensor, number: int) -> Tensor:
    """Return how often each class occurs among the counted entries, as int64."""
    # Entries that do not count go into a class of their own, because a mask would synchronize the device.
    counts = torch.zeros(number + 1, dtype=torch.int64, device=classes.device)
    index = torch.where(counted, classes, number)
    return counts.index_add_(0, index, torch.ones_like(index))[:number]


class Accuracy(ClassMetric):
    """The share of predictions that are right."""

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        if self.multilabel:
            right = (predictions_in(outputs) > self.threshold) == (targets > 0.5)
            counted = torch.ones_like(right)
        else:
            predicted, true, counted, _ = self.classes_in(outputs, targets)
            right = (predicted == true) & counted
        self.add("right", right.sum())
        self.add("count", counted.sum())

    def compute(self) -> float:
        """Return the accuracy; NaN without predictions."""
        return float(ratio(self.sums["right"], self.sums["count"])) if self.sums else math.nan


class TopK(ClassMetric):
    """The share of targets among the k largest outputs.

    Args:
        k: the number of outputs.
        ignore_index: see `ClassMetric`.
    """

    def __init__(self, k: int = 5, *, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        self.k = k

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        outputs = predictions_in(outputs)
        if targets.is_floating_point() and targets.shape == outputs.shape:
            targets = targets.argmax(dim=1)
        outputs = classes_first(outputs, targets)
        largest = outputs.topk(min(self.k, outputs.shape[1]), dim=1).indices
        counted = targets != self.ignore_index
        self.add("right", ((largest == targets.unsqueeze(1)).any(dim=1) & counted).sum())
        self.add("count", counted.sum())

    def compute(self) -> float:
        """Return the accuracy; NaN without targets."""
        return float(ratio(self.sums["right"], self.sums["count"])) if self.sums else math.nan


class ConfusionMatrix(ClassMetric):
    """The number of targets of each class (rows) that were predicted as each class (columns)."""

    higher_is_better = None

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        if self.multilabel:
            raise ValueError("a confusion matrix needs one class per target, not several labels")
        predicted, true, counted, number = self.classes_in(outputs, targets)
        cells = count_classes(torch.where(counted, true, 0) * number + predicted, counted, number**2)
        self.add("matrix", cells.reshape(number, number))

    def compute(self) -> list[list[int]]:
        """Return the counts."""
        return self.sums["matrix"].tolist() if self.sums else []


class PerClass(ClassMetric):
    """A metric of each class, from its counts of hits, of predictions and of targets.

    Args:
        average: macro (the mean over the classes that occur), micro (from the summed counts), binary (class 1 alone)
            or none (a list, NaN for classes that do not occur).
        ignore_index: see `ClassMetric`.
        threshold: see `ClassMetric`.
        multilabel: see `ClassMetric`; each label is a class.
    """

    def __init__(
        self,
        average: str | None = "macro",
        *,
        ignore_index: int = -100,
        threshold: float = 0.0,
        multilabel: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, threshold=threshold, multilabel=multilabel)
        self.average = "none" if average is None else average
        if self.average not in AVERAGES:
            raise ValueError(f"average={average}: expected one of {', '.join(AVERAGES)}")

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        if self.multilabel:
            true = (targets > 0.5).reshape(len(targets), -1)
            predicted = (predictions_in(outputs) > self.threshold).reshape(true.shape)
            counts = [(predicted & true).sum(dim=0), predicted.sum(dim=0), true.sum(dim=0)]
        else:
            labels, true, counted, number = self.classes_in(outputs, targets)
            hit = counted & (labels == true)
            counts = [
                count_classes(labels, hit, number),
                count_classes(labels, counted, number),
                count_classes(true, counted, number),
            ]
        self.add("counts", torch.stack(counts))

    def value(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Return the value of each class; NaN for 0 / 0."""
        raise NotImplementedError

    def occurs(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return whether a class counts in the macro average."""
        return predicted + true > 0

    def compute(self) -> float | list[float]:
        """Return the average; NaN without targets."""
        if not self.sums:
            return [] if self.average == "none" else math.nan
        hits, predicted, true = self.sums["counts"].cpu()
        if self.average == "micro":
            return float(self.value(hits.sum(), predicted.sum(), true.sum()))
        values, occurs = self.value(hits, predicted, true), self.occurs(predicted, true)
        values = torch.where(occurs, values.nan_to_num(0.0), math.nan)
        if self.average == "none":
            return [float(value) for value in values]
        if self.average == "binary":
            if len(values) != 2:
                raise ValueError(f"average=binary needs two classes, and the model has {len(values)}")
            return float(values[1])
        return float(values[occurs].mean())


class Precision(PerClass):
    """The share of the predictions of a class that are right."""

    def value(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:  # noqa: ARG002
        """Return hits / predictions."""
        return ratio(hits, predicted)


class Recall(PerClass):
    """The share of the targets of a class that were predicted."""

    def value(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:  # noqa: ARG002
        """Return hits / targets."""
        return ratio(hits, true)


class F1(PerClass):
    """The harmonic mean of precision and recall."""

    def value(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Return 2 hits / (predictions + targets)."""
        return ratio(2 * hits, predicted + true)


class BalancedAccuracy(Recall):
    """The mean recall over the classes that have targets.

    Args:
        ignore_index: see `ClassMetric`.
        threshold: see `ClassMetric`.
    """

    def __init__(self, *, ignore_index: int = -100, threshold: float = 0.0) -> None:
        super().__init__(ignore_index=ignore_index, threshold=threshold)

    def occurs(self, predicted: Tensor, true: Tensor) -> Tensor:  # noqa: ARG002
        """Return whether a class has targets."""
        return true > 0

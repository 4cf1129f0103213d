"""The shipped metrics against scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from trainkit import metrics as M

N, C = 61, 5
SIZES = [1, 7, N]


def over_batches(metric: Any, outputs: Any, targets: Tensor, size: int) -> Any:
    """Return the value after batches of a size, with a break in which the state is saved and loaded."""
    for start in range(0, len(targets), size):
        part = outputs[start : start + size]
        metric.update(part, targets[start : start + size])
        saved = metric.state_dict()
        metric.reset()
        metric.load_state_dict(saved)
    return metric.compute()


def class_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, C - 1, (N,), generator=generator)  # the last class has no targets
    return outputs, targets


Oracle = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], Any]
CLASSES: dict[str, tuple[Callable[[], Any], Oracle]] = {
    "accuracy": (M.Accuracy, sk.accuracy_score),
    "balanced accuracy": (M.BalancedAccuracy, lambda t, p: sk.recall_score(t, p, labels=np.unique(t), average="macro")),
    "macro precision": (M.Precision, lambda t, p: sk.precision_score(t, p, average="macro")),
    "micro recall": (lambda: M.Recall("micro"), lambda t, p: sk.recall_score(t, p, average="micro")),
    "macro recall": (M.Recall, lambda t, p: sk.recall_score(t, p, average="macro", zero_division=0)),
    "macro F1": (M.F1, lambda t, p: sk.f1_score(t, p, average="macro")),
    "micro F1": (lambda: M.F1("micro"), lambda t, p: sk.f1_score(t, p, average="micro")),
    "F1 per class": (lambda: M.F1("none"), lambda t, p: sk.f1_score(t, p, average=None)),
    "confusion matrix": (M.ConfusionMatrix, sk.confusion_matrix),
    "mean IoU": (M.MeanIoU, lambda t, p: sk.jaccard_score(t, p, average="macro")),
    "Dice per class": (lambda: M.Dice(None), lambda t, p: sk.f1_score(t, p, average=None)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_metric_of_classes_equals_that_of_scikit_learn(name: str, size: int) -> None:
    outputs, targets = class_data()
    make, oracle = CLASSES[name]
    wanted = oracle(targets.numpy(), outputs.argmax(1).numpy())
    np.testing.assert_allclose(over_batches(make(), outputs, targets, size), wanted, rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_top_k_and_the_token_losses_equal_those_of_scikit_learn(size: int) -> None:
    outputs, targets = class_data()
    wanted = sk.top_k_accuracy_score(targets.numpy(), outputs.numpy(), k=3, labels=range(C))
    assert over_batches(M.TopK(3), outputs, targets, size) == pytest.approx(wanted, rel=1e-12)
    loss = sk.log_loss(targets.numpy(), outputs.softmax(1).numpy(), labels=range(C))
    assert over_batches(M.Perplexity(), outputs, targets, size) == pytest.approx(math.exp(loss), rel=1e-12)
    assert over_batches(M.BitsPerToken(), outputs, targets, size) == pytest.approx(loss / math.log(2), rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_metric_of_numbers_equals_that_of_scikit_learn(offset: float, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(N, 3, generator=generator, dtype=torch.float64) + offset
    outputs = targets + torch.randn(N, 3, generator=generator, dtype=torch.float64) / 3
    true, predicted = targets.numpy(), outputs.numpy()
    mse = sk.mean_squared_error(true, predicted)
    assert over_batches(M.R2(), outputs, targets, size) == pytest.approx(sk.r2_score(true, predicted), rel=1e-12)
    assert over_batches(M.MAE(), outputs, targets, size) == pytest.approx(
        sk.mean_absolute_error(true, predicted), rel=1e-12
    )
    assert over_batches(M.RMSE(), outputs, targets, size) == pytest.approx(math.sqrt(mse), rel=1e-12)


def test_ignored_targets_do_not_count() -> None:
    outputs, targets = class_data()
    ignored = torch.arange(N) % 3 == 0
    marked = targets.masked_fill(ignored, -100)
    for make in (M.Accuracy, M.F1, M.ConfusionMatrix, M.TopK, M.Perplexity):
        wanted = over_batches(make(), outputs[~ignored], targets[~ignored], N)
        np.testing.assert_allclose(over_batches(make(), outputs, marked, 7), wanted, rtol=1e-12)


def test_single_outputs_are_logits_of_two_classes() -> None:
    outputs = class_data()[0][:, :1]
    targets = (torch.arange(N) % 2).double()[:, None]
    true, predicted = targets.flatten().numpy(), (outputs > 0).flatten().numpy()
    assert over_batches(M.F1("binary"), outputs, targets, 7) == pytest.approx(sk.f1_score(true, predicted))
    assert over_batches(M.F1(), outputs[:, 0], targets[:, 0].long(), 7) == pytest.approx(
        sk.f1_score(true, predicted, average="macro")
    )


def test_several_labels_have_a_value_each() -> None:
    outputs = class_data()[0]
    targets = (class_data()[0].roll(1, 0) > 0).double()
    wanted = sk.f1_score(targets.numpy(), (outputs > 0).numpy(), average="macro")
    assert over_batches(M.F1(multilabel=True), outputs, targets, 7) == pytest.approx(wanted, rel=1e-12)


def test_outputs_may_be_a_mapping_or_have_the_classes_last() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs, targets = torch.randn(6, 4, 9, generator=generator), torch.randint(0, 9, (6, 4), generator=generator)
    wanted = over_batches(M.F1(), outputs.movedim(-1, 1), targets, 6)
    metric = M.F1()
    metric.update({"logits": outputs}, targets)
    assert metric.compute() == wanted
    with pytest.raises(TypeError, match="a dict, expected a tensor, or a mapping with logits or out"):
        metric.update({"boxes": outputs}, targets)


def test_a_function_over_everything_is_exact() -> None:
    outputs, targets = class_data()

    def auc(outputs: Tensor, targets: Tensor) -> float:
        return float(sk.roc_auc_score(targets > 1, outputs[:, 1]))

    assert over_batches(M.Collected(auc), outputs, targets, 7) == auc(outputs, targets)


def test_wrong_shapes_are_an_error_and_never_broadcast() -> None:
    with pytest.raises(ValueError, match="same shape, found outputs"):
        M.MAE().update(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"expected outputs \(N, classes, ...\)"):
        M.F1().update(torch.zeros(4, 3), torch.zeros(4, 2).long())
    with pytest.raises(ValueError, match="average=mean: expected one of macro, micro"):
        M.F1("mean")


@pytest.mark.parametrize("name", [name for name in M.__all__ if name != "Collected"])
def test_a_metric_without_samples_has_no_value(name: str) -> None:
    value = getattr(M, name)().compute()
    assert value == [] or math.isnan(value)

"""Running means against exact sums; accuracy and denominators by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from trainkit.training.losses import denominator
from trainkit.training.metrics import Mean, count_correct

CPU = torch.device("cpu")


def test_a_mean_of_many_small_values_is_exact() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    mean = Mean(CPU)
    for value in values:
        mean.update(value, 3)
    exact = sum(Fraction(float(value)) * 3 for value in values)
    assert mean.sum() == pytest.approx(float(exact), rel=1e-14)
    assert mean.item() == pytest.approx(float(exact / (3 * len(values))), rel=1e-14)


def test_nan_and_infinity_are_never_filtered() -> None:
    for bad in (math.nan, math.inf):
        mean = Mean(CPU)
        mean.update(torch.tensor(1.0), 1)
        mean.update(torch.tensor(bad), 1)
        assert not math.isfinite(mean.item())


def test_a_mean_over_nothing_adds_nothing() -> None:
    mean = Mean(CPU)
    mean.update(torch.tensor(2.0), torch.tensor(4))
    mean.update(torch.tensor(math.nan), torch.tensor(0))
    assert mean.item() == 2.0
    assert math.isnan(Mean(CPU).item())


def test_a_custom_loss_can_define_its_denominator() -> None:
    class Masked(nn.Module):
        def denominator(self, targets: torch.Tensor) -> torch.Tensor:
            return (targets > 0).sum()

    assert denominator(Masked(), torch.tensor([1.0, 0.0, 2.0]), 3) == 2


def test_binary_accuracy_has_its_threshold_at_one_half() -> None:
    outputs, targets = torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([[1.0], [1.0], [0.0]])
    correct = count_correct(nn.BCEWithLogitsLoss(), outputs, targets)
    assert correct is not None
    assert [int(n) for n in correct] == [1, 3]


def test_regression_and_single_logits_have_no_accuracy() -> None:
    assert count_correct(nn.SoftMarginLoss(), torch.rand(3, 1), torch.tensor([0, 1, 1])) is None
    assert count_correct(nn.L1Loss(), {"boxes": torch.rand(3, 1)}, torch.rand(3)) is None
    assert count_correct(nn.MSELoss(), torch.rand(3, 1), torch.rand(3, 1)) is None


def test_a_custom_loss_has_an_accuracy_only_with_an_output_per_class() -> None:
    class Ordinal(nn.Module):
        """One output per threshold between two classes."""

    outputs, targets = torch.eye(4), torch.arange(4)
    assert count_correct(Ordinal(), outputs, targets, classes=5) is None
    for loss_fn, classes in ((Ordinal(), 4), (Ordinal(), None), (nn.CrossEntropyLoss(), 5)):
        correct = count_correct(loss_fn, outputs, targets, classes)
        assert correct is not None
        assert [int(number) for number in correct] == [4, 4]

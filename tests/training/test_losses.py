"""Losses of epochs, whole and in micro batches, against the loss of the whole set in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    SAMPLES,
    loss_case,
    loss_in_float64,
    make_loader_of,
    make_state,
)
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import train_epoch
from trainkit.training.losses import FEW, denominator

LOSSES = [
    "cross entropy",
    "class weights",
    "ignore_index",
    "custom ignore_index",
    "weights and ignore_index",
    "label smoothing",
    "reduction sum",
    "weighted sum",
    "probabilities",
    "pixels",
    "weighted pixels",
    "nll",
    "mse",
    "mse of images",
    "mse sum",
    "l1",
    "smooth l1",
    "bce",
]


MICRO_LOSSES = [*LOSSES, "a class of weight 0"]  # a batch of one such sample is 0 / 0 in torch


@pytest.mark.parametrize("batch_size", [1, 7, 32, SAMPLES])
@pytest.mark.parametrize("name", LOSSES)
def test_train_loss_is_the_loss_over_the_whole_set(name: str, batch_size: int) -> None:
    model, loss_fn, inputs, targets = loss_case(name)
    metrics = train_epoch(make_state(model, loss_fn), make_loader_of(inputs, targets, batch_size), [])
    assert metrics["train/loss"] == pytest.approx(loss_in_float64(model, loss_fn, inputs, targets), rel=1e-6, abs=1e-6)
    assert metrics["train/samples"] == SAMPLES


@pytest.mark.parametrize("name", LOSSES)
def test_val_loss_is_the_loss_over_the_whole_set(name: str) -> None:
    model, loss_fn, inputs, targets = loss_case(name)
    metrics = evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None))
    assert metrics["val/loss"] == pytest.approx(loss_in_float64(model, loss_fn, inputs, targets), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("micro_batch", [16, 8, 5, 1])
@pytest.mark.parametrize("name", MICRO_LOSSES)
def test_a_micro_batch_does_not_change_weights_or_losses(name: str, micro_batch: int) -> None:
    model, loss_fn, inputs, targets = loss_case(name)
    inputs, targets = inputs.double(), targets.double() if targets.is_floating_point() else targets
    whole, parts = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    loss_fn = loss_fn.double()
    if name == "a class of weight 0":
        targets[::4] = 1  # some micro batches count no target
    wanted = train_epoch(make_state(whole, loss_fn, lr=1e-3), make_loader_of(inputs, targets, 32), [])
    state = make_state(parts, loss_fn, lr=1e-3, micro_batch=micro_batch)
    metrics = train_epoch(state, make_loader_of(inputs, targets, 32), [])
    assert metrics["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-9)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("custom", ["denominator", "subclass"])
def test_a_micro_batch_with_ignored_targets_only_adds_nothing(custom: str) -> None:
    class Masked(nn.Module):
        def denominator(self, targets: Tensor) -> Tensor:
            return (targets >= 0).sum()

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            kept = targets >= 0
            return nn.functional.cross_entropy(outputs[kept], targets[kept])

    class Same(nn.CrossEntropyLoss):
        pass

    model, _, inputs, targets = loss_case("ignore_index")
    loss_fn = Masked() if custom == "denominator" else Same()
    targets = torch.where(torch.arange(SAMPLES) % 16 < 8, -100, loss_case("cross entropy")[3])
    whole, parts = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    loader = make_loader_of(inputs.double(), targets, 16, seed=None)
    wanted = train_epoch(make_state(whole, loss_fn, lr=1e-2), loader, [])
    got = train_epoch(make_state(parts, loss_fn, lr=1e-2, micro_batch=4), loader, [])
    assert got["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-12)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ignore_index", [-100, 0, 3])
@pytest.mark.parametrize("shape", [(1,), (FEW,), (FEW + 1,), (4, 3)])
def test_the_denominator_is_the_number_by_which_torch_divides_the_sum(
    shape: tuple[int, ...], ignore_index: int
) -> None:
    targets = torch.randint(1, 3, shape)
    targets.view(-1)[::2] = 3
    outputs = torch.randn(shape[0], 4, *shape[1:], dtype=torch.float64)
    mean, total = (nn.CrossEntropyLoss(ignore_index=ignore_index, reduction=how) for how in ("mean", "sum"))
    found = float(denominator(mean, targets, shape[0]))
    if found:
        assert found == pytest.approx(float(total(outputs, targets) / mean(outputs, targets)), rel=1e-12)
    else:
        assert mean(outputs, targets).isnan()


def test_an_object_of_torchs_loss_may_have_a_denominator_of_its_own() -> None:
    loss_fn = nn.CrossEntropyLoss()
    loss_fn.denominator = lambda targets: 7 * len(targets)  # type: ignore[assignment]
    assert denominator(loss_fn, torch.zeros(3, dtype=torch.int64), 3) == 21


def test_l1_and_mse_of_the_tutorial() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    for loss_fn, wanted in ((nn.L1Loss(), 0.6667), (nn.MSELoss(), 1.3333)):
        state = make_state(nn.Identity(), loss_fn, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        metrics = evaluate(state, make_loader_of(outputs, targets, 2, seed=None))
        assert metrics["val/loss"] == pytest.approx(wanted, abs=5e-5)


class Total(nn.Module):
    """The sum of the squared errors of a batch, as a mean over a denominator of 1."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()

    def denominator(self, targets: Tensor) -> int:  # noqa: ARG002
        return 1


@pytest.mark.parametrize("micro_batch", [None, 1, 5, 16])
def test_a_denominator_of_1_makes_a_sum_whose_epoch_loss_is_the_mean_over_the_batches(micro_batch: int | None) -> None:
    model, _, inputs, targets = loss_case("mse")
    model, inputs, targets = model.double(), inputs.double(), targets.double()
    batches = [(model(x) - y).square().sum() for x, y in zip(inputs.split(16), targets.split(16), strict=True)]
    wanted = sum(batch.item() for batch in batches) / len(batches)
    state = make_state(model, Total(), micro_batch=micro_batch)
    loader = make_loader_of(inputs, targets, 16, seed=None)
    assert train_epoch(state, loader, [])["train/loss"] == pytest.approx(wanted, rel=1e-12)
    assert evaluate(state, loader)["val/loss"] == pytest.approx(wanted, rel=1e-12)
    gradient = torch.autograd.grad(batches[-1], list(model.parameters()))
    for param, expected in zip(model.parameters(), gradient, strict=True):
        torch.testing.assert_close(param.grad, expected, rtol=1e-10, atol=1e-10)

"""Moving averages of weights, several optimizers and losses with parameters, against handwritten loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import MetricsCollector, compose_settings, loss_case, loss_in_float64, make_loader_of, make_state
from trainkit.build import session as build
from trainkit.data.loaders import epoch_order
from trainkit.models import ToyCNN
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit
from trainkit.training.state import State


class Weights:
    """A hook that copies the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_step(self, state: State) -> None:
        self.seen.append([p.detach().clone().double() for p in state.objects.model.parameters()])


def test_ema_averages_the_weights_after_each_step_and_is_evaluated() -> None:
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    weights, seen = Weights(), MetricsCollector([])
    state = make_state(model, loss_fn, lr=0.05, epochs=2, ema=0.9, monitor="val/loss")
    val = make_loader_of(inputs, targets, 16, seed=None)
    fit(state, make_loader_of(inputs, targets, 8), val, [weights, seen])
    average = weights.seen[0]
    for after in weights.seen[1:]:
        average = [0.9 * a + 0.1 * b for a, b in zip(average, after, strict=True)]
    for ours, wanted in zip(state.objects.evaluated[0].parameters(), average, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(state.objects.evaluated[0])
    assert seen.seen[-1]["val/loss"] == pytest.approx(loss_in_float64(twin, loss_fn, inputs, targets), rel=1e-6)
    raw = evaluate(make_state(model, loss_fn), val)
    assert raw["val/loss"] != seen.seen[-1]["val/loss"]


def test_ema_does_not_change_the_training() -> None:
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    twin = copy.deepcopy(model)
    for one, decay in ((model, None), (twin, 0.99)):
        fit(make_state(one, loss_fn, lr=0.05, ema=decay), make_loader_of(inputs, targets, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_ema_keeps_the_latest_batch_statistics_and_averages_the_loss_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs * self.scale, targets)

    _, _, inputs, targets = loss_case("cross entropy")
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)), Scaled()
    params = [{"params": [*model.parameters(), *loss_fn.parameters()], "name": "default"}]
    state = make_state(model, loss_fn, optimizer=torch.optim.SGD(params, lr=0.1), ema=0.5)
    fit(state, make_loader_of(inputs, targets, 8))
    averaged, averaged_loss = state.objects.evaluated
    assert torch.equal(averaged.get_buffer("0.running_mean"), model.get_buffer("0.running_mean"))
    assert loss_fn.scale != 1
    assert averaged_loss.scale != loss_fn.scale


def test_two_optimizers_zero_step_and_clip_like_a_handwritten_loop() -> None:
    overrides = ["optim=muon_sgd", "lr=0.05", "clip_norm=0.5", "epochs=1", "limit_batches=6", "data.split=off"]
    overrides += ["memory_format=contiguous"]
    session = build.build_session(compose_settings([*overrides, "scheduler=exponential", "scheduler.interval=step"]))
    seen = MetricsCollector([])
    fit(session.state, session.train, hooks=[seen])

    images, labels = session.train.tensors  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = ToyCNN()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1)
    sgd = torch.optim.SGD(others, lr=0.05, momentum=0.9, nesterov=True)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95) for optimizer in (muon, sgd)]
    for indices in epoch_order(len(images), 0, 0).split(32)[:6]:
        loss = nn.CrossEntropyLoss()(model(images[indices].float() / 255), labels[indices])
        muon.zero_grad()
        sgd.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([*matrices, *others], 0.5)
        rate = sgd.param_groups[0]["lr"]
        muon.step()
        sgd.step()
        for scheduler in schedulers:
            scheduler.step()
    for ours, theirs in zip(session.state.objects.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert seen.seen[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert seen.seen[0]["lr/matrices"] == seen.seen[0]["lr/default"] == rate


def test_each_of_several_optimizers_can_have_its_own_scheduler(here: Any) -> None:
    (here / "conf/scheduler").mkdir(parents=True)
    text = "muon: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 1, gamma: 0.5, interval: epoch}\n"
    (here / "conf/scheduler/own.yaml").write_text(text)
    session = build.build_session(compose_settings(["optim=muon_sgd", "scheduler=own", "epochs=2", "limit_batches=2"]))
    fit(session.state, session.train, session.val)
    rates = {group["name"]: group["lr"] for group in session.state.objects.optimizer.param_groups}
    assert rates == {"matrices": 0.01 / 4, "default": 0.01}


def test_clip_value_clips_the_parameters_of_every_group() -> None:
    overrides = ["optim=muon_sgd", "clip_value=1e-4", "epochs=1", "limit_batches=1"]
    session = build.build_session(compose_settings(overrides))
    fit(session.state, session.train, session.val)
    largest = [float(p.grad.abs().max()) for p in session.state.objects.model.parameters() if p.grad is not None]
    assert len(largest) == 10
    assert max(largest) == pytest.approx(1e-4)


def test_a_learnable_loss_is_trained_and_can_be_watched(here: Any) -> None:
    (here / "lossmodule.py").write_text(
        "import torch\nclass Shift(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.shift = torch.nn.Parameter(torch.zeros(()))\n    def forward(self, outputs, targets):\n"
        "        return ((outputs + self.shift - targets) ** 2).mean()\n"
    )
    (here / "conf/loss").mkdir(parents=True)
    (here / "conf/loss/shift.yaml").write_text("_target_: lossmodule.Shift\n")
    overrides = ["data=line", "model=linear", "loss=shift", "watch=[loss.shift]", "epochs=2", "lr=0.001"]
    session = build.build_session(compose_settings(overrides))
    seen = MetricsCollector([])
    fit(session.state, session.train, session.val, [seen])
    assert seen.seen[-1]["param/loss.shift"] == session.state.objects.loss_fn.shift.item() != 0
    assert "grad/loss.shift" in seen.seen[-1]

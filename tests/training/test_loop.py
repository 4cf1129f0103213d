"""The training loop against handwritten loops: epochs, schedulers, early stopping, hooks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tests.helpers import (
    SAMPLES,
    MetricsCollector,
    compose_settings,
    loss_case,
    loss_in_float64,
    make_loader_of,
    make_state,
    only_optimizer,
)
from trainkit.build import session as build
from trainkit.data.loaders import epoch_order
from trainkit.models import ToyCNN
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit
from trainkit.training.state import State


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # some processors emulate bf16, so the batches are small
def test_weights_and_losses_equal_those_of_a_handwritten_loop(layout: str, precision: str, here: Any) -> None:  # noqa: ARG001
    overrides = ["model=toy_cnn", "optim=sgd", "lr=0.01", "optim.momentum=0.9", "epochs=3", "batch_size=8"]
    overrides += ["limit_batches=6", f"memory_format={layout}", f"precision={precision}", "data.split=off"]
    session = build.build_session(compose_settings(overrides))
    reported: list[float] = []

    class Record:
        def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:  # noqa: ARG002
            reported.append(metrics["train/loss"])

    fit(session.state, session.train, session.val, [Record()])

    images, labels = session.train.tensors  # type: ignore[attr-defined]
    torch.manual_seed(0)
    strides = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    model = ToyCNN()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    for epoch in range(3):
        total, seen = 0.0, 0
        for indices in epoch_order(len(images), 0, epoch).split(8)[:6]:
            inputs, targets = (images[indices].float() / 255).to(memory_format=strides), labels[indices]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(inputs)
            seen += len(inputs)
        assert reported[epoch] == total / seen
    for ours, theirs in zip(session.state.objects.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_accuracy_counts_correct_predictions_without_ignored_targets() -> None:
    model, loss_fn, inputs, targets = loss_case("ignore_index")
    metrics = evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None))
    kept = targets != -100
    correct = (model(inputs).argmax(1) == targets)[kept]
    assert metrics["val/accuracy"] == pytest.approx(float(correct.double().mean()))


def test_evaluation_changes_neither_weights_nor_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    _, loss_fn, inputs, targets = loss_case("cross entropy")
    before = copy.deepcopy(model.state_dict())
    first = evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None))
    assert evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None)) == first
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_training_stops_after_patience_epochs_without_a_new_best() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    state = make_state(model, loss_fn, lr=0.0, epochs=50, monitor="train/loss", patience=3)
    fit(state, make_loader_of(inputs, targets, SAMPLES, seed=None))
    assert state.stopped_early
    assert state.progress.epoch == 4  # the first epoch is the best, three more do not improve
    assert state.progress.best is not None
    assert state.progress.best["epoch"] == 1


def test_schedulers_step_each_epoch_or_each_step_and_the_current_rate_is_logged() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    for interval, wanted in (("epoch", [1e-3, 1e-4, 1e-5]), ("step", [1e-8, 1e-14, 1e-20])):
        copied = copy.deepcopy(model)
        state = make_state(copied, loss_fn, lr=1e-3, epochs=3)
        schedulers = state.objects.step_schedulers if interval == "step" else state.objects.epoch_schedulers
        schedulers.append(StepLR(only_optimizer(state), step_size=1, gamma=0.1))
        seen: list[dict[str, Any]] = []
        fit(state, make_loader_of(inputs, targets, 8), hooks=[MetricsCollector(seen)])
        assert [metrics["lr/default"] for metrics in seen] == pytest.approx(wanted)


def test_a_plateau_scheduler_receives_the_monitored_value() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    state = make_state(model, loss_fn, lr=0.0, epochs=4, monitor="train/loss")
    state.objects.optimizer.param_groups[0]["lr"] = 0.0
    scheduler = ReduceLROnPlateau(only_optimizer(state), patience=0)
    state.objects.epoch_schedulers.append(scheduler)
    fit(state, make_loader_of(inputs, targets, SAMPLES, seed=None))
    assert scheduler.best == pytest.approx(loss_in_float64(model, loss_fn, inputs, targets), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "best", "epochs"),
    [
        ([3.0, 2.0, 2.5, 2.4, 1.0], 2, 4),  # stops before the next improvement
        ([math.nan, math.nan, math.nan, 1.0], None, 2),
        ([5.0, 4.0, -math.inf, 4.5], 2, 4),
        ([1.0, 0.95, 0.9, 0.85, 0.5], 3, 3),  # improves each time, but by less than min_delta
    ],
)
def test_the_best_epoch_and_early_stopping_by_hand(
    values: list[float], best: int | None, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainkit.training import loop

    model, loss_fn, inputs, targets = loss_case("mse")
    losses = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"val/loss": next(losses)})
    monkeypatch.setattr(loop, "check_finite", lambda *_: None)
    state = make_state(model, loss_fn, epochs=len(values), monitor="val/loss", patience=2, min_delta=0.2)
    loader = make_loader_of(inputs, targets, SAMPLES)
    fit(state, loader, loader)
    assert (state.progress.best and state.progress.best["epoch"]) == best
    assert state.progress.epoch == epochs


def test_hooks_are_called_at_start_steps_epochs_and_end() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    events: list[str] = []

    class Hook:
        def on_start(self, state: State) -> None:
            events.append(f"start {state.progress.batches}")

        def on_step(self, state: State) -> None:
            events.append(f"step {state.progress.step}")

        def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:
            events.append(f"epoch {metrics['epoch']} after {state.progress.step}")

        def on_end(self, state: State) -> None:
            events.append(f"end {state.progress.epoch}")

    fit(make_state(model, loss_fn), make_loader_of(inputs, targets, 16), hooks=[Hook(), object()])
    assert events == ["start 3", "step 1", "step 2", "step 3", "epoch 1 after 3", "end 1"]

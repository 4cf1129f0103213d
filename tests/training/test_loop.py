"""The loop against oracles: a loop written by hand, and the whole set's loss in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
from trainkit.core.errors import NonFiniteError
from trainkit.data.loaders import epoch_order
from trainkit.models import ToyCNN
from trainkit.training.loop import evaluate, fit, train_epoch
from trainkit.training.state import State

LOSSES = [
    "cross entropy",
    "class weights",
    "ignore_index",
    "ignore_index of its own",
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


MICRO_LOSSES = [*LOSSES, "a class of weight 0"]  # whose batches of one are 0 / 0 in torch itself


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
def test_a_micro_batch_changes_no_weight_and_no_loss(name: str, micro_batch: int) -> None:
    model, loss_fn, inputs, targets = loss_case(name)
    inputs, targets = inputs.double(), targets.double() if targets.is_floating_point() else targets
    whole, parts = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    loss_fn = loss_fn.double()
    if name == "a class of weight 0":
        targets[::4] = 1  # so that some parts hold nothing that counts
    wanted = train_epoch(make_state(whole, loss_fn, lr=1e-3), make_loader_of(inputs, targets, 32), [])
    state = make_state(parts, loss_fn, lr=1e-3, micro_batch=micro_batch)
    metrics = train_epoch(state, make_loader_of(inputs, targets, 32), [])
    assert metrics["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-9)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("own", ["denominator", "subclass"])
def test_a_part_of_a_batch_in_which_nothing_counts_adds_nothing(own: str) -> None:
    class Masked(nn.Module):
        def denominator(self, targets: Tensor) -> Tensor:
            return (targets >= 0).sum()

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            kept = targets >= 0
            return nn.functional.cross_entropy(outputs[kept], targets[kept])

    class Same(nn.CrossEntropyLoss):
        pass

    model, _, inputs, targets = loss_case("ignore_index")
    loss_fn = Masked() if own == "denominator" else Same()
    targets = torch.where(torch.arange(SAMPLES) % 16 < 8, -100, loss_case("cross entropy")[3])
    whole, parts = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    loader = make_loader_of(inputs.double(), targets, 16, seed=None)
    wanted = train_epoch(make_state(whole, loss_fn, lr=1e-2), loader, [])
    got = train_epoch(make_state(parts, loss_fn, lr=1e-2, micro_batch=4), loader, [])
    assert got["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-12)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_optimizer_without_a_learning_rate_trains() -> None:
    class Signs(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"alpha": 0.01})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
            for p in self.param_groups[0]["params"]:
                p.data -= 0.01 * p.grad.sign()

    model, loss_fn, inputs, targets = loss_case("cross entropy")
    seen: list[dict[str, Any]] = []
    state = make_state(model, loss_fn, optimizer=Signs(model.parameters()))
    fit(state, make_loader_of(inputs, targets, 16), hooks=[MetricsCollector(seen)])
    assert not [name for name in seen[0] if name.startswith("lr/")]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_losses_are_those_of_a_loop_written_by_hand(layout: str, precision: str, here: Any) -> None:  # noqa: ARG001
    overrides = ["model=toy_cnn", "optim=sgd", "lr=0.01", "optim.momentum=0.9", "epochs=3", "limit_batches=6"]
    overrides += [f"memory_format={layout}", f"precision={precision}", "data.split=off"]
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
        for indices in epoch_order(len(images), 0, epoch).split(32)[:6]:
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


def test_l1_and_mse_of_the_tutorial() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    for loss_fn, wanted in ((nn.L1Loss(), 0.6667), (nn.MSELoss(), 1.3333)):
        state = make_state(nn.Identity(), loss_fn, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        metrics = evaluate(state, make_loader_of(outputs, targets, 2, seed=None))
        assert metrics["val/loss"] == pytest.approx(wanted, abs=5e-5)


def test_lbfgs_counts_the_first_of_its_evaluations() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    before = loss_in_float64(model, loss_fn, inputs, targets)
    by_hand = copy.deepcopy(model)
    params = [{"params": list(model.parameters()), "name": "default"}]
    state = make_state(model, loss_fn, optimizer=torch.optim.LBFGS(params, max_iter=5))
    metrics = train_epoch(state, make_loader_of(inputs, targets, SAMPLES), [])
    assert metrics["train/loss"] == pytest.approx(before, rel=1e-6)

    optimizer = torch.optim.LBFGS(by_hand.parameters(), max_iter=5)
    order = epoch_order(SAMPLES, 0, 0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(by_hand(inputs[order]), targets[order])
        loss.backward()
        return loss

    optimizer.step(closure)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_clipping_bounds_the_norm_over_all_parameters_and_reports_what_it_was() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    free = copy.deepcopy(model)
    fit(make_state(free, loss_fn), make_loader_of(inputs, targets, SAMPLES))
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in free.parameters() if p.grad is not None))
    state = make_state(model, loss_fn, clip_norm=0.5)
    seen: list[dict[str, Any]] = []
    fit(state, make_loader_of(inputs, targets, SAMPLES), hooks=[MetricsCollector(seen)])
    clipped = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert clipped == pytest.approx(0.5, rel=1e-4)
    assert seen[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_clipping_by_value_bounds_each_element() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    fit(make_state(model, loss_fn, clip_value=1e-3), make_loader_of(inputs, targets, SAMPLES))
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) == pytest.approx(1e-3)


def test_accuracy_counts_right_predictions_and_leaves_ignored_targets_out() -> None:
    model, loss_fn, inputs, targets = loss_case("ignore_index")
    metrics = evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None))
    kept = targets != -100
    right = (model(inputs).argmax(1) == targets)[kept]
    assert metrics["val/accuracy"] == pytest.approx(float(right.double().mean()))


def test_evaluation_changes_neither_weights_nor_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    _, loss_fn, inputs, targets = loss_case("cross entropy")
    before = copy.deepcopy(model.state_dict())
    first = evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None))
    assert evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None)) == first
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_training_stops_early_after_so_many_epochs_without_a_new_best() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    state = make_state(model, loss_fn, lr=0.0, epochs=50, monitor="train/loss", patience=3)
    fit(state, make_loader_of(inputs, targets, SAMPLES, seed=None))
    assert state.stopped_early
    assert state.progress.epoch == 4  # the first is the best, three more bring nothing
    assert state.progress.best is not None
    assert state.progress.best["epoch"] == 1


def test_where_steps_are_not_looked_at_a_non_finite_loss_is_reported_as_it_is_and_ends_the_training() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    inputs[5] = math.inf
    seen: list[dict[str, Any]] = []
    state = make_state(model, loss_fn)
    state.settings = replace(state.settings, check_steps=False)  # as on an accelerator
    with pytest.raises(NonFiniteError, match=r"train/loss is (nan|inf)"):
        fit(state, make_loader_of(inputs, targets, 8), hooks=[MetricsCollector(seen)])
    assert not math.isfinite(seen[0]["train/loss"])


def test_schedulers_step_each_epoch_or_each_step_and_the_rate_in_force_is_logged() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    for interval, wanted in (("epoch", [1e-3, 1e-4, 1e-5]), ("step", [1e-8, 1e-14, 1e-20])):
        copied = copy.deepcopy(model)
        state = make_state(copied, loss_fn, lr=1e-3, epochs=3)
        schedulers = state.objects.step_schedulers if interval == "step" else state.objects.epoch_schedulers
        schedulers.append(StepLR(only_optimizer(state), step_size=1, gamma=0.1))
        seen: list[dict[str, Any]] = []
        fit(state, make_loader_of(inputs, targets, 8), hooks=[MetricsCollector(seen)])
        assert [metrics["lr/default"] for metrics in seen] == pytest.approx(wanted)


def test_a_plateau_scheduler_is_given_the_monitored_value() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    state = make_state(model, loss_fn, lr=0.0, epochs=4, monitor="train/loss")
    state.objects.optimizer.param_groups[0]["lr"] = 0.0
    scheduler = ReduceLROnPlateau(only_optimizer(state), patience=0)
    state.objects.epoch_schedulers.append(scheduler)
    fit(state, make_loader_of(inputs, targets, SAMPLES, seed=None))
    assert scheduler.best == pytest.approx(loss_in_float64(model, loss_fn, inputs, targets), rel=1e-6)


def test_no_forward_pass_is_larger_than_the_micro_batch() -> None:
    sizes: list[int] = []

    class Sees(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    _, loss_fn, inputs, targets = loss_case("cross entropy")
    state = make_state(Sees(6, 5), loss_fn, micro_batch=4)
    wanted = loss_in_float64(state.objects.model, loss_fn, inputs, targets)
    sizes.clear()
    seen: list[dict[str, Any]] = []
    val = make_loader_of(inputs, targets, 32, seed=None)
    fit(state, make_loader_of(inputs, targets, 32), val, hooks=[MetricsCollector(seen)])
    assert max(sizes) == 4
    assert seen[0]["val/loss"] == pytest.approx(wanted, rel=1e-6)


def test_reported_gradients_are_those_that_backward_gave() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    params = [{"params": list(model.parameters()), "name": "default"}]
    # This one writes into the gradients as it steps.
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9, nesterov=True, foreach=True)
    seen: list[dict[str, Any]] = []
    by_hand = copy.deepcopy(model)
    more: dict[str, Any] = {"optimizer": optimizer, "watch": {"weight": model.weight}, "clip_norm": 0.1}
    fit(
        make_state(model, loss_fn, **more),
        make_loader_of(inputs, targets, SAMPLES, seed=None),
        hooks=[MetricsCollector(seen)],
    )
    loss_fn(by_hand(inputs), targets).backward()
    assert seen[0]["grad/weight"] == pytest.approx(float(by_hand.weight.grad.norm()), rel=1e-6)
    norm = nn.utils.get_total_norm([p.grad for p in by_hand.parameters()])
    assert seen[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "best", "epochs"),
    [
        ([3.0, 2.0, 2.5, 2.4, 1.0], 2, 4),  # stops before it would have been better again
        ([math.nan, math.nan, math.nan, 1.0], None, 2),
        ([5.0, 4.0, -math.inf, 4.5], 2, 4),
        ([1.0, 0.95, 0.9, 0.85, 0.5], 3, 3),  # better each time, but never by min_delta
    ],
)
def test_the_best_epoch_and_early_stopping_by_hand(
    values: list[float], best: int | None, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainkit.training import loop

    model, loss_fn, inputs, targets = loss_case("mse")
    told = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"val/loss": next(told)})
    monkeypatch.setattr(loop, "check_finite", lambda *_: None)
    state = make_state(model, loss_fn, epochs=len(values), monitor="val/loss", patience=2, min_delta=0.2)
    loader = make_loader_of(inputs, targets, SAMPLES)
    fit(state, loader, loader)
    assert (state.progress.best and state.progress.best["epoch"]) == best
    assert state.progress.epoch == epochs


@pytest.mark.parametrize(
    ("looked_at", "words"), [(True, "step 1: the gradient is not finite"), (False, "grad_norm is")]
)
def test_a_gradient_that_is_not_finite_ends_the_training(looked_at: bool, words: str) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.sqrt() + 0 * x

    state = make_state(Root(), nn.MSELoss())
    state.settings = replace(state.settings, check_steps=looked_at)
    with pytest.raises(NonFiniteError, match=words):
        fit(state, make_loader_of(torch.ones(4, 1), torch.ones(4, 1), 4))


def test_hooks_are_told_of_start_steps_epochs_and_end() -> None:
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

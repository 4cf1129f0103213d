"""Metric objects and hooks with a state: exact values, and exact resumes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from tests.conftest import Command
from tests.helpers import loss_case, make_loader_of, make_state, read_history
from trainkit import metrics as M
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.runs.snapshot import capture_state, digest, restore_state
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit
from trainkit.training.metric_set import MetricSet
from trainkit.training.trial_validation import try_validation

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
CPU = torch.device("cpu")
F1 = "{_target_: torchmetrics.classification.MulticlassF1Score, num_classes: 10, on: [train, val]}"
OPTIMIZING = """
import torch

class Hook:
    def on_start(self, state):
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.Adam([self.weight])
    def on_step(self, state):
        self.optimizer.zero_grad()
        (self.weight - state.step).square().sum().backward()
        self.optimizer.step()
    def on_epoch(self, state, metrics): metrics["mine/weight"] = self.weight.sum().item()
    def state_dict(self): return {"weight": self.weight, "optimizer": self.optimizer.state_dict()}
    def load_state_dict(self, saved):
        self.weight.data.copy_(saved["weight"])
        self.optimizer.load_state_dict(saved["optimizer"])
"""


class Average:
    """A custom metric with plain attributes."""

    higher_is_better = False

    def reset(self) -> None:
        """Start again."""
        self.total, self.count = 0.0, 0

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch."""
        self.total += float(outputs.double().mean(dim=1).sum())
        self.count += len(targets)

    def compute(self) -> dict[str, float]:
        """Return a mapping."""
        return {"mean": self.total / self.count, "count": self.count}


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 3}, {"ema": 0.5}])
def test_metrics_of_train_and_val_equal_one_pass_over_everything(settings: dict[str, Any]) -> None:
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    state = make_state(model, loss_fn, **settings)  # with a learning rate of 0
    for part in ("train", "val"):
        metrics = {"f1": M.F1(), "classes": M.F1(None), "accuracy": M.Accuracy(), "average": Average()}
        setattr(state.objects, f"{part}_metrics", MetricSet(part, metrics, CPU))
    loader = make_loader_of(inputs, targets, 7)  # with a short last batch
    fit(state, loader, loader)
    outputs = model(inputs).detach()
    wanted = f1_score(targets.numpy(), outputs.argmax(1).numpy(), average="macro")
    values = state.progress.best
    assert values is not None
    for part in ("train", "val"):
        assert values[f"{part}/f1"] == pytest.approx(wanted, rel=1e-12)
        assert len(values[f"{part}/classes"]) == 5
        assert values[f"{part}/average/mean"] == pytest.approx(float(outputs.mean()), rel=1e-5)
        assert values[f"{part}/average/count"] == len(targets)
    assert values["val/accuracy"] == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))


@pytest.mark.parametrize("make", [M.F1, M.R2, Average])
def test_a_metric_continues_in_the_middle_of_an_epoch(make: Any) -> None:
    model, loss_fn, inputs, targets = loss_case("mse" if make is M.R2 else "cross entropy")

    def state_with_metric() -> Any:
        state = make_state(model, loss_fn)
        state.objects.train_metrics = MetricSet("train", {"m": make()}, CPU)
        return state

    whole, half, resumed = state_with_metric(), state_with_metric(), state_with_metric()
    for part in (inputs[:20], targets[:20]), (inputs[20:], targets[20:]):
        whole.objects.train_metrics.update(model(part[0]), part[1])
    half.objects.train_metrics.update(model(inputs[:20]), targets[:20])
    half.progress.batch = 1
    restore_state(resumed, capture_state(half, {}))
    resumed.objects.train_metrics.update(model(inputs[20:]), targets[20:])
    assert resumed.objects.train_metrics.compute() == whole.objects.train_metrics.compute()


def test_a_state_that_cannot_be_stored_is_an_error_that_names_the_metric() -> None:
    class Seen(Average):
        def reset(self) -> None:
            self.seen: set[int] = set()

    model, loss_fn, *_ = loss_case("mse")
    state = make_state(model, loss_fn)
    state.objects.train_metrics = MetricSet("train", {"seen": Seen()}, CPU)
    with pytest.raises(CheckpointError, match=r"metrics\.seen.*: a set cannot be stored"):
        capture_state(state, {})


def test_a_hook_sees_every_batch_of_a_validation() -> None:
    class Collector:
        seen: list[torch.Tensor] = []  # noqa: RUF012

        def on_val_batch(self, state: Any, inputs: Any, targets: Any, outputs: Any) -> None:  # noqa: ARG002
            assert len(inputs) == len(targets)
            self.seen.append(outputs)

    model, loss_fn, inputs, targets = loss_case("mse")
    evaluate(make_state(model, loss_fn), make_loader_of(inputs, targets, 7, seed=None), [Collector()])
    torch.testing.assert_close(torch.cat(Collector.seen), model(inputs).detach())


def test_wrong_metrics_are_config_errors_with_a_hint(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mets.py").write_text("def auc(outputs, targets): return 1.0\n")
    bad = ["metrics=classification", "+metrics.loss={_target_: trainkit.metrics.F1, on: [vall]}"]
    found = forked(*bad, "monitor.metric=val/f2")
    assert found.returncode == 2
    assert "did you mean monitor.metric=val/f1?" in found.stderr
    assert "metrics.loss: trainkit reports a loss of its own" in found.stderr
    assert "metrics.loss.on=['vall']: must be val, train or [train, val]\n  did you mean val?" in found.stderr
    found = forked("+metrics.auc._target_=mets.auc")
    assert found.returncode == 2
    assert "trainkit.metrics.Collected +metrics.auc.function=mets.auc calls it once" in found.stderr
    matrix = ["metrics=classification", "monitor.metric=val/confusion_matrix"]
    found = forked(*matrix)
    assert "auto does not cover val/confusion_matrix, because ConfusionMatrix has no higher_is_better" in found.stderr


def test_a_metric_that_does_not_take_the_outputs_ends_the_run_after_the_first_step(
    forked: Command, tmp_path: Path
) -> None:
    found = forked("metrics=regression", "limit_batches=4", "hydra.run.dir=run")
    assert found.returncode == 1
    assert "error: metrics.mae: ValueError: expected outputs and targets of the same shape" in found.stderr
    assert "inputs (2, 3, 32, 32) float32, targets (2,) int64" in found.stderr
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_a_monitored_metric_that_is_not_a_number_ends_the_run_after_the_first_step() -> None:
    state = make_state(nn.Linear(3, 2), nn.MSELoss(), monitor="val/mean")
    state.objects.val_metrics = MetricSet("val", {"mean": Average()}, CPU)
    with pytest.raises(ConfigError, match=r"val/mean: this run has no such metric\n.* val/mean/mean"):
        try_validation(state, torch.randn(4, 3), torch.zeros(4, 2))
    state = make_state(nn.Linear(3, 2), nn.CrossEntropyLoss(), monitor="val/f1")
    state.objects.val_metrics = MetricSet("val", {"f1": M.F1(average="none")}, CPU)
    with pytest.raises(ConfigError, match=r"val/f1: is \[.*\], not a number"):
        try_validation(state, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))


def test_trying_the_metrics_does_not_change_the_training() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout())
    state = make_state(model, nn.MSELoss())
    state.objects.val_metrics = MetricSet("val", {"mean": Average()}, CPU)
    inputs = torch.randn(4, 3)
    before, rng = capture_state(state, {}), torch.get_rng_state()
    try_validation(state, inputs, torch.zeros(4, 2))
    assert digest(capture_state(state, {})) == digest(before)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("command", re.findall(r"^    (trainkit .*)$", PAGE, re.M))
def test_every_command_of_the_page_trains(command: str, forked: Command, tmp_path: Path) -> None:
    found = forked(*shlex.split(command)[1:], "epochs=1", "limit_batches=2", "hydra.run.dir=run", "progress=off")
    assert found.returncode == 0, found.stderr
    assert len([name for name in read_history(tmp_path / "run")[0] if name.startswith("val/")]) >= 2


@pytest.mark.slow
def test_metrics_and_a_hook_with_an_optimizer_survive_kills(trainkit: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OPTIMIZING)
    short = ["epochs=2", "limit_batches=5", "checkpoint.every_steps=1", "monitor.metric=val/f1"]
    own = "+metrics.own={_target_: trainkit.metrics.F1, on: [train, val]}"
    found = trainkit("verify-resume", *short, f"+metrics.f1={F1}", own, "+hooks.h._target_=mine.Hook")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "equal: " in found.stdout

"""Metrics of hooks: they count like trainkit's own, and never replace them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Command
from tests.helpers import loss_case, make_loader_of, make_state, read_history
from trainkit.core.errors import ConfigError
from trainkit.training.hooks import HookError
from trainkit.training.loop import fit
from trainkit.training.metrics import Metrics
from trainkit.training.state import State

SCORES = [3.0, 1.0, 2.0, 5.0, 4.0, 4.5]


class Score:
    """A hook that adds a score to each epoch."""

    def __init__(self, scores: list[Any] = SCORES) -> None:
        self.scores = scores

    def on_epoch(self, state: State, metrics: Metrics) -> None:  # noqa: ARG002
        metrics["mine/score"] = self.scores[metrics["epoch"] - 1]


class Ends:
    """A hook that keeps what is final after each epoch."""

    def __init__(self) -> None:
        self.best: list[int] = []
        self.metrics: list[Metrics] = []

    def on_epoch_end(self, state: State, metrics: Metrics) -> None:
        assert state.progress.best is not None
        self.best.append(state.progress.best["epoch"])
        self.metrics.append(dict(metrics))


def trained(hooks: list[Any], **settings: Any) -> State:
    model, loss_fn, inputs, targets = loss_case("mse")
    schedulers = settings.pop("epoch_schedulers", None)
    state = make_state(model, loss_fn, lr=1e-3, **{"monitor": "mine/score", "epochs": len(SCORES), **settings})
    if schedulers is not None:
        state.objects.epoch_schedulers = [schedulers(state.objects.optimizer)]
    fit(state, make_loader_of(inputs, targets, 16), hooks=hooks)
    return state


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_of_a_hook_decides_the_best_epoch(mode: str) -> None:
    ends = Ends()
    state = trained([Score(), ends], mode=mode)
    sign = 1 if mode == "min" else -1
    wanted = [1 + min(range(n), key=lambda i: sign * SCORES[i]) for n in range(1, 7)]
    assert ends.best == wanted
    assert state.progress.best is not None
    assert state.progress.best["mine/score"] == SCORES[wanted[-1] - 1]


def test_a_metric_of_a_hook_stops_early() -> None:
    assert trained([Score()], mode="min", patience=2).progress.epoch == 4  # best in epoch 2, then two worse epochs


def test_a_metric_of_a_hook_drives_a_plateau() -> None:
    def plateau(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)

    state = trained([Score()], epoch_schedulers=plateau)
    assert state.objects.optimizer.param_groups[0]["lr"] == 1e-3 * 0.5**4  # worse than epoch 2, four times


def test_hooks_see_the_metrics_of_the_hooks_before_them() -> None:
    class Doubled:
        def on_epoch(self, state: State, metrics: Metrics) -> None:  # noqa: ARG002
            metrics["mine/doubled"] = 2 * metrics["mine/score"]

    ends = Ends()
    trained([Score(), Doubled(), ends])
    assert [row["mine/doubled"] for row in ends.metrics] == [2 * score for score in SCORES]


@pytest.mark.parametrize("name", ["train/loss", "train/samples", "epoch", "step", "grad_norm", "seconds", "lr/default"])
@pytest.mark.parametrize("change", ["changes", "removes"])
def test_a_hook_may_not_replace_a_metric_of_trainkit(name: str, change: str) -> None:
    class Replaces:
        def on_epoch(self, state: State, metrics: Metrics) -> None:  # noqa: ARG002
            if change == "removes":
                del metrics[name]
            else:
                metrics[name] = 0.125

    with pytest.raises(HookError, match=f"on_epoch {change} the metric {name}"):
        trained([Score(), Replaces()])


def test_a_hook_may_return_the_metrics_that_it_has_changed() -> None:
    class Returns(Score):
        def on_epoch(self, state: State, metrics: Metrics) -> Metrics:  # type: ignore[override]
            super().on_epoch(state, metrics)
            return metrics

    assert trained([Returns()], mode="max").progress.best["mine/score"] == 5.0


def test_a_hook_may_not_replace_a_metric_of_another_hook() -> None:
    with pytest.raises(HookError, match="changes the metric mine/score"):
        trained([Score(), Score([0.0] * 6)])


@pytest.mark.parametrize(
    "value", [torch.tensor(1.5), np.float32(1.5), np.array(1.5), torch.tensor(1.5).requires_grad_()]
)
def test_scalars_of_torch_and_numpy_can_be_monitored(value: Any) -> None:
    state = trained([Score([value] * 6)])
    assert state.progress.best is not None
    assert state.progress.best["mine/score"] == 1.5
    assert type(state.progress.best["mine/score"]) is float


@pytest.mark.parametrize(
    ("value", "found"), [("high", "'high', not a number"), (None, "None, not a number"), (True, "True")]
)
def test_a_monitored_metric_must_be_a_number(value: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"monitor.metric=mine/score: is {found}"):
        trained([Score([value] * 6)])


def test_a_monitored_metric_that_no_hook_adds_is_an_error_that_lists_the_metrics() -> None:
    with pytest.raises(ConfigError, match="this run has no such metric") as raised:
        trained([Score()], monitor="mine/scores")
    assert "mine/score" in str(raised.value)
    assert "train/loss" in str(raised.value)


def test_a_monitored_metric_that_is_nan_is_never_the_best() -> None:
    state = trained([Score([math.nan, 2.0, math.nan, 3.0, math.inf, 4.0])])
    assert state.progress.best is not None
    assert state.progress.best["epoch"] == 2


MODULE = """
class Score:
    def on_epoch(self, state, metrics):
        metrics["mine/score"] = [3.0, 1.0, 2.0, 5.0][metrics["epoch"] - 1]


class Replaces:
    def on_epoch(self, state, metrics):
        metrics["val/loss"] = -1.0
"""


def test_the_history_the_best_checkpoint_and_the_result_agree_on_a_hooks_metric(
    tmp_path: Path, forked: Command
) -> None:
    (tmp_path / "scores.py").write_text(MODULE)
    result = forked(
        "+hooks.score._target_=scores.Score", "monitor.metric=mine/score", "monitor.mode=min", "model=mlp", "epochs=4",
        "progress=plain", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "best of 4 epochs by mine/score: epoch 2" in result.stdout
    assert "mine/score 1.0000" in result.stdout
    assert result.stderr.count("mine/score") == 4  # in the line of each epoch
    best = json.loads((tmp_path / "run" / "run.json").read_text())["best"]
    rows = read_history(tmp_path / "run")
    assert best["metric"] == "mine/score"
    assert best["value"] == rows[1]["mine/score"] == 1.0
    assert (tmp_path / "run" / "checkpoints" / "best").exists()
    result = forked("resume", "run", "epochs=5", "hooks.score=null")
    assert result.returncode != 0


def test_a_replaced_validation_loss_is_an_error_and_nothing_is_recorded(tmp_path: Path, forked: Command) -> None:
    (tmp_path / "scores.py").write_text(MODULE)
    result = forked("+hooks.r._target_=scores.Replaces", "model=mlp", "epochs=2", "hydra.run.dir=run")
    assert result.returncode == 2
    assert "hooks.r: scores.Replaces" in result.stderr
    assert "changes the metric val/loss" in result.stderr
    assert not (tmp_path / "run" / "history.jsonl").exists()

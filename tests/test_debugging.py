"""The config group `debug`: fast, overfit, profile and anomaly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.conftest import Command
from trainkit.config.compose import compose_run
from trainkit.core.errors import ConfigError, NonFiniteError, TrainkitError
from trainkit.engine.resume import resume
from trainkit.engine.train import train
from trainkit.runs.directory import Run
from trainkit.training.state import State

MODELS = """
import torch
from torch import nn

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 10)
    def forward(self, x):
        return self.fc(x.flatten(1))

class SqrtOfZero(Flat):
    def forward(self, x):
        y = super().forward(x)
        z = (y - y).sqrt() * 0  # the planted line
        return y + z

class Log(nn.Module):
    def forward(self, x):
        return (x - x).log()

class LogOfZero(Flat):
    def __init__(self):
        super().__init__()
        self.inner = Log()
    def forward(self, x):
        return self.inner(super().forward(x))

class Stuck(Flat):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
    def forward(self, x):
        return self.fc(x.flatten(1) * 0)
"""


@pytest.fixture(autouse=True)
def models(here: Path) -> None:
    (here / "mymodels.py").write_text(MODELS)


def train_with(*overrides: str) -> Run:
    return train(compose_run([*overrides, "progress=off"]))


def test_fast_trains_two_epochs_of_two_batches_and_validates_two_batches_in_outputs_debug(here: Path) -> None:
    run = train_with("debug=fast")
    assert [row["train/samples"] for row in run.history] == [64, 64]
    assert run.info["val_samples"] == 64
    assert run.directory.is_relative_to(here / "outputs/debug")
    assert not (here / "outputs/latest").exists()


def test_a_fast_run_resumes(here: Path) -> None:  # noqa: ARG001
    run = train_with("debug=fast")
    assert [row["epoch"] for row in resume(run, ["epochs=3"]).history] == [1, 2, 3]


class FirstLoss:
    """A hook that keeps the loss of the first step."""

    def __init__(self) -> None:
        self.value = math.nan

    def on_step(self, state: State) -> None:
        if state.progress.step == 1:
            self.value = state.progress.loss.item()


def test_overfit_trains_one_batch_until_its_loss_is_a_share_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    first = FirstLoss()
    run = train(compose_run(["debug=overfit", "model=mymodels.Flat", "lr=0.05", "progress=off"]), hooks=[first])
    assert run.history[-1]["train/loss"] <= 0.01 * first.value < run.history[-2]["train/loss"]
    assert run.info["train_samples"] == 32
    assert run.history[-1]["step"] < 1000
    assert "the model can fit a batch" in capsys.readouterr().out


def test_overfit_uses_the_same_batch_in_each_step() -> None:
    class Seen:
        def __init__(self) -> None:
            self.sums: set[float] = set()

        def on_start(self, state: object) -> None:
            state.model.register_forward_pre_hook(lambda _, args: self.sums.add(float(args[0].sum())))  # type: ignore[attr-defined]

    seen = Seen()
    overrides = ["debug=overfit", "model=mymodels.Flat", "lr=0.05", "steps=30"]
    with pytest.raises(TrainkitError):
        train(compose_run([*overrides, "progress=off"]), hooks=[seen])
    assert len(seen.sums) == 1


def test_a_model_that_cannot_fit_a_batch_ends_overfit_with_an_error_and_hints() -> None:
    with pytest.raises(TrainkitError, match="the model does not fit a batch") as caught:
        train_with("debug=overfit", "model=mymodels.Stuck", "steps=40")
    assert caught.value.exit_code == 1
    assert "set the dropout of dropout to 0" in str(caught.value)


def test_profile_writes_a_trace_and_a_table_of_the_slowest_operations(capfd: pytest.CaptureFixture[str]) -> None:
    run = train_with("debug=profile", "model=mymodels.Flat")
    trace = json.loads((run.directory / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    steps = [event for event in trace["traceEvents"] if event.get("name") == "Optimizer.step#SGD.step"]
    assert "aten::addmm" in names
    assert len(steps) == 10
    out, err = capfd.readouterr()
    assert "aten::addmm" in out
    assert "trace of 10 steps" in out
    assert "Handler.cpp" not in err


def test_a_training_that_is_too_short_for_a_profile_is_an_error() -> None:
    with pytest.raises(TrainkitError, match="the profile begins after 8"):
        train_with("debug=profile", "model=mymodels.Flat", "steps=3")


def test_anomaly_names_the_line_whose_gradient_is_nan() -> None:
    line = 1 + MODELS.splitlines().index("        z = (y - y).sqrt() * 0  # the planted line")
    with pytest.raises(NonFiniteError) as caught:
        train_with("debug=anomaly", "model=mymodels.SqrtOfZero")
    assert f"mymodels.py, line {line}, in forward: z = (y - y).sqrt() * 0" in str(caught.value)
    assert "SqrtBackward" in str(caught.value)
    assert not torch.is_anomaly_enabled()


def test_anomaly_names_the_first_module_with_a_non_finite_output() -> None:
    backward = torch.Tensor.backward
    with pytest.raises(NonFiniteError, match=r"an infinite value is model\.inner, a Log"):
        train_with("debug=anomaly", "model=mymodels.LogOfZero")
    assert torch.Tensor.backward is backward


def test_anomaly_does_not_change_the_numbers() -> None:
    plain = train_with("limit_batches=2", "epochs=1")
    checked = train_with("limit_batches=2", "epochs=1", "debug=anomaly")
    assert plain.history[0]["train/loss"] == checked.history[0]["train/loss"]
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    "overrides",
    [
        ["debug=overfit", "limit_batches=3"],
        ["debug=overfit", "data.augment.flip=random"],
        ["debug=fast", "logger=csv"],
        ["debug=profile", "epochs=3"],
        ["debug=anomaly", "on_nonfinite=skip"],
        ["debug=overfit", "early_stop=off"],
    ],
)
def test_an_override_of_a_key_that_debug_sets_is_an_error(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    assert f"{overrides[1]}: {overrides[0]} sets {overrides[1].partition('=')[0]}" in str(caught.value)


def test_a_mapping_with_a_key_that_debug_sets_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"debug=overfit sets data\.augment\.flip"):
        compose_run(["debug=overfit", "data={augment: {flip: random}}"])


@pytest.mark.parametrize(
    "override", ["data=cifar10", "data={num_workers: 1}", "+hooks={mine: {_target_: mymodels.Flat}}"]
)
def test_a_section_of_which_debug_sets_other_keys_can_be_chosen(override: str) -> None:
    settings = compose_run(["debug=overfit", override]).settings
    assert not settings.source.data.augment.flip
    assert settings.source.hooks.debug["_target_"] == "trainkit.debugging.Overfit"


def test_the_keys_that_debug_sets_are_in_the_shown_config(forked: Command) -> None:
    done = forked("--cfg", "job", "debug=overfit")
    assert "steps_per_epoch: 10" in done.stdout
    assert "trainkit.debugging.Overfit" in done.stdout

"""Runs by steps and by time: where they end, and how a longer run continues them."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.helpers import KILL_MODULE, compose_settings, read_history
from tests.processes import Forks
from trainkit.config.schema import UNNAMED
from trainkit.core.errors import ConfigError
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS

slow = pytest.mark.slow
MODULE = (
    KILL_MODULE
    + """
import os, signal, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.first(x))))

class Points:
    classes = ["a", "b", "c"]

    def __init__(self, size=37):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(4), index % 3

class KillInEpoch:
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch(self, state, metrics):
        if state.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)

class Sleep:
    def on_step(self, state):
        time.sleep(0.02)
"""
)
DATA = "train: {_target_: lengthmodule.Points}\nval: {_target_: lengthmodule.Points, size: 20}\n"
# 8 batches in a pass over the data.
BASE = ["model=net", "data=points", "batch_size=5", "progress=plain", "optim=sgd", "optim.momentum=0.9", "lr=0.05"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a small model and data with random samples."""
    (tmp_path / "lengthmodule.py").write_text(MODULE)
    for name, text in (("model/net", "_target_: lengthmodule.Net\n"), ("data/points", DATA)):
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    return tmp_path


def train(command: Command, directory: str, *overrides: str) -> str:
    """Train without an error; return what was printed."""
    done = command(*BASE, *overrides, f"hydra.run.dir={directory}")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def resume(command: Command, directory: str, *overrides: str) -> str:
    """Resume without an error; return what was printed."""
    done = command("resume", directory, *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def final(run: Path) -> tuple[str, list[dict[str, Any]], str | None]:
    """Return the hash of the final state, the history without clocks, and the checkpoint of the best epoch."""
    checkpoints = Checkpoints(run / "checkpoints")
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_history(run)]
    return digest(checkpoints.newest()[1]), history, checkpoints.read_pointer("best")


# ---------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps=100", "epochs=30"], ["steps=100 and epochs=30", "write epochs=off"]),
        (["steps=100", "epochs=20"], ["steps=100 and epochs=20", "write epochs=off"]),
        (["epochs=off"], ["nothing ends the training", "steps=N"]),
        (["epochs=off", "max_minutes=1", "scheduler=multistep"], ["scheduler.milestones", "needs a planned length"]),
        (["steps=9", "scheduler=cosine", "scheduler.T_max=${epochs}"], ["scheduler.T_max", "epochs, which is off"]),
        (["scheduler=cosine", "scheduler.T_max=${steps_per_epoch}"], ["scheduler.T_max", "with a colon"]),
    ],
)
def test_contradicting_lengths_are_a_config_error(overrides: list[str], words: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_settings(overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_with_steps_epochs_are_off_in_the_settings() -> None:
    for overrides in (["steps=100"], ["steps=100", "epochs=off"]):
        settings = compose_settings(overrides)
        assert (settings.steps, settings.epochs, settings.source.epochs) == (100, None, None)


@pytest.mark.parametrize(
    ("overrides", "total"),
    [
        (["steps=100", "scheduler.interval=step"], 100),
        (["steps=100", "scheduler.interval=epoch"], 13),  # 12 epochs of 8 steps, and a short one
        (["steps=100", "scheduler.interval=step", "scheduler.T_max=${total_steps:0.25}"], 25),
        (["steps=100", "steps_per_epoch=8", "scheduler.interval=step", "scheduler.T_max=${steps_per_epoch:2}"], 16),
    ],
)
def test_total_steps_follow_the_steps_of_the_run(overrides: list[str], total: int) -> None:
    settings = compose_settings(["scheduler=cosine", *overrides])
    assert settings.with_data(classes=10, steps_per_epoch=8).scheduler[UNNAMED]["T_max"] == total


def test_a_limit_of_the_validation_follows_limit_batches_unless_it_is_given() -> None:
    assert compose_settings([]).limit_val_batches is None
    assert compose_settings(["limit_batches=7"]).limit_val_batches == 7
    assert compose_settings(["limit_batches=7", "limit_val_batches=off"]).limit_val_batches is None


# ------------------------------------------------------------------------------------------- by steps


def test_a_run_by_steps_ends_inside_an_epoch_with_a_whole_history_line(forked: Command, own: Path) -> None:
    text = train(forked, "run", "steps=20")
    rows = read_history(own / "run")
    assert [(row["epoch"], row["step"], row["train/samples"]) for row in rows] == [(1, 8, 37), (2, 16, 37), (3, 20, 20)]
    assert rows[-1]["val/loss"] > 0
    assert rows[-1]["grad_norm"] > 0
    assert "epoch 3/3  step 20/20  train/loss" in text
    assert json.loads((own / "run" / "run.json").read_text())["status"] == "completed"
    assert Checkpoints(own / "run" / "checkpoints").read_pointer("last") == "step-00000020"
    assert "finished: all 20 steps are done; to train longer: trainkit resume run steps=N" in resume(forked, "run")


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (
            20,
            ["scheduler=step", "scheduler.step_size=1", "ema=0.9", "steps_per_epoch=6", "checkpoint.keep=1", "lr=0.9"],
        ),
        pytest.param(20, ["early_stop.patience=9", "scheduler=step", "scheduler.step_size=1"], marks=slow),
        pytest.param(5, ["scheduler=plateau", "scheduler.patience=0"], marks=slow),
        pytest.param(16, ["checkpoint.every_steps=3"], marks=slow),
    ],
    ids=str,
)
def test_more_steps_end_with_the_bits_of_a_run_of_that_length(
    first: int, more: list[str], forked: Command, own: Path
) -> None:
    train(forked, "straight", "steps=45", *more)
    train(forked, "resumed", f"steps={first}", *more)
    text = resume(forked, "resumed", "steps=45")
    assert f"resumed from step-{first:08d}: step {first + 1} of 45, epoch" in text
    assert final(own / "resumed") == final(own / "straight")


@pytest.mark.usefixtures("own")
def test_fewer_steps_than_done_are_refused(forked: Command) -> None:
    train(forked, "run", "steps=20")
    done = forked("resume", "run", "steps=10")
    assert done.returncode == 2
    assert "steps=10: the run has made 20 steps" in done.stderr
    assert "write steps=20 or more" in done.stderr


def test_a_run_may_continue_by_epochs_instead_of_steps(forked: Command, own: Path) -> None:
    train(forked, "straight", "epochs=4")
    train(forked, "resumed", "steps=20")
    resume(forked, "resumed", "steps=off", "epochs=4")
    assert final(own / "resumed") == final(own / "straight")


def killed(forks: Forks, own: Path, *overrides: str) -> None:
    """Train until a hook kills the process."""
    process = forks.start(*BASE, "hydra.run.dir=resumed", *overrides, cwd=own)
    assert process.wait() == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("{_target_: lengthmodule.Kill, step: 17}", marks=slow),
        "{_target_: lengthmodule.KillInEpoch, epoch: 4}",
    ],
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=slow)])
def test_a_killed_run_by_steps_resumes_to_the_same_bits(
    workers: int, hook: str, forked: Command, forks: Forks, own: Path
) -> None:
    more = ["steps=20", "steps_per_epoch=6", "checkpoint.every_steps=5", f"data.num_workers={workers}"]
    train(forked, "straight", *more)
    killed(forks, own, *more, f"+hooks.kill={hook}")  # at a step, or while the short last epoch is closed
    resume(forked, "resumed", "~hooks.kill")
    assert final(own / "resumed") == final(own / "straight")


# -------------------------------------------------------------------------------------------- by time


def test_max_minutes_ends_a_complete_run_that_continues_exactly(forked: Command, own: Path) -> None:
    train(forked, "straight", "epochs=2")
    sleep = "+hooks.sleep._target_=lengthmodule.Sleep"
    text = train(forked, "resumed", "epochs=off", "max_minutes=0.003", sleep)  # 0.18 s: it ends in step 9 or before
    assert "stopped after 0.003 minutes" in text
    info = json.loads((own / "resumed" / "run.json").read_text())
    assert (info["status"], info["exit_code"], info["why"]) == (
        "completed",
        0,
        "stopped after 0.003 minutes: max_minutes",
    )
    rows = read_history(own / "resumed")
    assert 1 <= rows[-1]["step"] <= 9
    assert rows[-1]["val/loss"] > 0
    assert sum(row["seconds"] for row in rows) >= 0.18
    hint = "to train longer: trainkit resume resumed max_minutes=N"
    assert hint in resume(forked, "resumed")
    assert hint in resume(forked, "resumed", "max_minutes=0.001")  # the time of the first process counts
    resume(forked, "resumed", "max_minutes=9", "epochs=2", "~hooks.sleep")
    assert final(own / "resumed") == final(own / "straight")


def test_time_may_end_a_run_before_its_planned_steps(forked: Command, own: Path) -> None:
    train(forked, "run", "steps=100000", "max_minutes=0.001", "scheduler=cosine")
    assert read_history(own / "run")[-1]["step"] < 100000


def test_verify_resume_refuses_a_run_that_the_clock_ends(forked: Command) -> None:
    done = forked("verify-resume", "max_minutes=1")
    assert done.returncode == 2
    assert "two trainings by the clock end at different steps" in done.stderr


# ------------------------------------------------------------------------------- what may change, what not


def test_another_steps_per_epoch_is_refused_unless_allowed(forked: Command, own: Path) -> None:
    train(forked, "run", "steps=20", "steps_per_epoch=6")
    done = forked("resume", "run", "steps=40", "steps_per_epoch=10")
    assert done.returncode == 3
    assert "steps_per_epoch: 6 in the checkpoint, 10 now" in done.stderr
    resume(forked, "run", "steps=40", "steps_per_epoch=10", "resume.allow=[steps_per_epoch]")
    assert read_history(own / "run")[-1]["step"] == 40


def test_the_limit_of_the_validation_alone_may_change(forked: Command, own: Path) -> None:
    train(forked, "whole", "epochs=1")
    train(forked, "run", "epochs=1", "limit_val_batches=2")
    (whole,), (limited,) = read_history(own / "whole"), read_history(own / "run")
    assert whole["train/loss"] == limited["train/loss"]
    assert whole["val/loss"] != limited["val/loss"]
    resume(forked, "run", "epochs=2", "limit_val_batches=off")
    assert len(read_history(own / "run")) == 2


def test_a_logger_gets_an_epoch_again_that_a_longer_run_continues(forked: Command, own: Path) -> None:
    train(forked, "run", "steps=12", "logger=csv")
    resume(forked, "run", "steps=20")
    written = (own / "run" / "csv" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in written[1:]] == ["8", "16", "20"]

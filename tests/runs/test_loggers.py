"""Loggers hold the numbers of the history, continue with a resumed run, and never stop or change a training."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

import trainkit
from tests.conftest import Command
from tests.helpers import read_history
from tests.runs.logger_files import Logged, read_csv, read_logged
from trainkit.config.compose import compose_sweep
from trainkit.runs import loggers
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.logger_backends import CSV
from trainkit.runs.loggers import LoggedRun, names_of
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS

slow = pytest.mark.slow
TOOLS = ["csv", "tensorboard", "trackio", pytest.param("wandb", marks=slow), pytest.param("mlflow", marks=slow)]
ALL = "logger=[csv,tensorboard,trackio,wandb]"
OFFLINE = {"WANDB_MODE": "offline"}
MODULE = """
import os, random, time
import numpy as np
import torch

class Faulty:
    '''A logger that draws from each generator, and fails or blocks in a method.'''
    def __init__(self, fails="", how="raise"):
        self.fails, self.how = fails, how
        self.draw()
    def draw(self):
        random.random(), np.random.rand(), torch.rand(1), np.random.seed(3), torch.manual_seed(3), random.seed(3)
    def act(self, method):
        self.draw()
        if self.fails == method:
            if self.how == "exit":
                raise SystemExit(3)
            if self.how == "block":
                time.sleep(1000)
            raise ValueError("no network\\nfor " + os.environ.get("HF_TOKEN", "anyone"))
    def start(self, run):
        self.act("start")
    def log_epoch(self, epoch, values):
        self.act("log_epoch")
    def finish(self, status, why):
        self.act("finish")

class Stop:
    def __init__(self, how): self.how = how
    def on_epoch_end(self, state, metrics):
        if metrics["epoch"] == 2:
            if self.how == "raise":
                raise ValueError("planned")
            os.kill(os.getpid(), 15)
            time.sleep(1)
"""
LINE = ["experiment=line_fit", "epochs=3", "progress=plain"]
IN = ["hydra.run.dir=run"]
SMALL = ["model=mlp", "model.hidden=[8]", "limit_batches=2", "epochs=3"]


@pytest.fixture
def own(here: Path) -> Path:
    """A folder with a module of loggers and hooks."""
    (here / "own.py").write_text(MODULE)
    return here


def assert_holds_history(found: Logged, run: Path, *, ignore: tuple[str, ...] = ()) -> None:
    """Check that a logger holds the numbers of `history.jsonl`, each once."""
    expected = {row.pop("epoch"): {key: [float(value)] for key, value in row.items()} for row in read_history(run)}
    kept = {epoch: {k: v for k, v in row.items() if k not in ignore} for epoch, row in found.rows.items()}
    assert kept == {epoch: {k: v for k, v in row.items() if k not in ignore} for epoch, row in expected.items()}
    assert found.runs == 1


def final_state(run: Path) -> str:
    """Return a hash of the last checkpoint."""
    return digest(Checkpoints(run / "checkpoints").newest()[1])


def train_in_process(*overrides: str) -> Run:
    """Train in this process."""
    return trainkit.train(trainkit.compose([*LINE, *overrides]), directory="run")


def assert_done(done: Any) -> None:
    """Check that a command succeeded, and no logger failed."""
    assert done.returncode == 0, done.stderr
    assert "is off" not in done.stderr


# ------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("tool", TOOLS)
def test_a_logger_holds_the_numbers_of_the_history_the_config_and_the_status(
    tool: str, forked: Command, own: Path
) -> None:
    assert_done(forked(*LINE, *IN, f"logger={tool}", **OFFLINE))
    found = read_logged(tool, own / "run")
    assert_holds_history(found, own / "run")
    assert len(found.rows) == 3
    assert found.rows[1]["lr/default"] == [0.1]
    assert found.status == "completed"
    assert float(found.config["optim.lr"]) == 0.1
    assert "line" in found.config["data.train._target_"]
    assert not any(key.startswith("_steps") for key in found.config)


def test_several_loggers_hold_the_same_numbers(forked: Command, own: Path) -> None:
    assert_done(forked(*LINE, *IN, "logger=[tensorboard,csv]"))
    for tool in ("tensorboard", "csv"):
        assert_holds_history(read_logged(tool, own / "run"), own / "run")


def test_without_a_logger_no_file_is_written(forked: Command, own: Path) -> None:
    assert_done(forked(*LINE, *IN))
    assert not (own / "run" / "loggers.json").exists()


@pytest.mark.parametrize(("how", "status"), [("raise", "failed: hooks.stop"), ("signal", "stopped: SIGTERM")])
@pytest.mark.parametrize("tool", ["csv", "tensorboard", "trackio"])
def test_the_status_of_a_run_that_did_not_end_is_logged_with_its_cause(
    tool: str, how: str, status: str, forked: Command, own: Path
) -> None:
    hook = f"+hooks.stop={{_target_: own.Stop, how: {how}}}"
    assert forked(*LINE, *IN, hook, f"logger={tool}").returncode in (1, 143)
    found = read_logged(tool, own / "run")
    assert found.status.startswith(status)
    assert_holds_history(found, own / "run")


def test_a_metric_that_appears_later_and_a_value_that_is_not_finite_are_in_the_csv_file(tmp_path: Path) -> None:
    logger = CSV()
    logger.start(LoggedRun(tmp_path, "0123abcd", "run", None, {}))
    logger.log_epoch(1, {"a": 0.1 + 0.2})
    logger.log_epoch(2, {"late": float("inf"), "a": 1e-300})
    assert read_csv(tmp_path).rows == {1: {"a": [0.1 + 0.2]}, 2: {"a": [1e-300], "late": [float("inf")]}}


@pytest.mark.slow
def test_no_file_of_a_logger_contains_a_secret(forked: Command, own: Path) -> None:
    secrets = {"HF_TOKEN": "tok-in-the-environment", "WANDB_API_KEY": "0123456789abcdef" * 3}
    (own / "own.py").write_text(
        MODULE + "\nfrom trainkit.models import Linear\n"
        "class Net(Linear):\n    def __init__(self, api_key, url): super().__init__(2, 2)\n"
    )
    words = ["model=own.Net", "model.api_key=literal-secret-1", "model.url=https://me:url-secret-2@host/x"]
    data = [
        "data=synthetic",
        "data.train.shape=[2]",
        "data.classes=2",
        "data.train.size=8",
        "epochs=2",
        "progress=plain",
    ]
    assert_done(forked(*data, *IN, *words, ALL, **secrets, **OFFLINE))
    files = [file for file in (own / "run").rglob("*") if file.is_file()]
    assert {".wandb", ".db", ".csv"} <= {file.suffix for file in files}
    for secret in ["literal-secret-1", "url-secret-2", *secrets.values()]:
        assert [file for file in files if secret.encode() in file.read_bytes()] == []


# ------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("tool", TOOLS)
def test_a_resumed_run_continues_its_logger_run_and_logs_each_epoch_once(tool: str, forked: Command, own: Path) -> None:
    # With lr=0 no epoch is a new best, so the checkpoint of epoch 3 is the newest after a kill in epoch 6.
    kill = "+hooks.kill={_target_: trainkit.diagnostics.verify_resume.Kill, step: 6}"
    often = "checkpoint.every_epochs=3"
    assert forked(*LINE, *IN, "epochs=7", "lr=0", often, kill, f"logger={tool}", **OFFLINE).returncode == -9
    assert len(read_history(own / "run")) == 5
    first = json.loads((own / "run" / "loggers.json").read_text())
    assert first["logged"] == {tool: 5}
    assert_done(forked("resume", "run", "hooks.kill.step=99", **OFFLINE))
    exact = tool in ("csv", "tensorboard", "wandb")  # the others keep the clocks of the first training
    found = read_logged(tool, own / "run")
    assert sorted(found.rows) == [1, 2, 3, 4, 5, 6, 7]
    assert_holds_history(found, own / "run", ignore=() if exact else CLOCKS)
    assert found.status == "completed"
    assert json.loads((own / "run" / "loggers.json").read_text()) == {"id": first["id"], "logged": {tool: 7}}


def test_a_logger_that_a_resume_adds_gets_all_epochs(forked: Command, own: Path) -> None:
    assert_done(forked(*LINE, *IN))
    assert_done(forked("resume", "run", "epochs=5", "logger=[csv,tensorboard]"))
    for tool in ("csv", "tensorboard"):
        assert_holds_history(read_logged(tool, own / "run"), own / "run")
    done = forked("resume", "run", "epochs=6", "logger=tensorbord")
    assert done.returncode == 2
    assert "did you mean logger=tensorboard?" in done.stderr


@pytest.mark.parametrize("content", ["", "[]", "{", '{"id": "../x", "logged": {}}', '{"id": "0123abcd", "logged": 3}'])
def test_a_damaged_file_of_the_loggers_does_not_stop_a_resume(content: str, own: Path) -> None:
    run = train_in_process("logger=csv")
    (run.directory / "loggers.json").write_text(content)
    trainkit.resume("run", ["epochs=5"])
    assert_holds_history(read_csv(own / "run"), own / "run")


def test_a_run_of_a_version_without_loggers_can_be_resumed(own: Path) -> None:  # noqa: ARG001
    run = train_in_process()
    config = run.directory / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("logger: {}\n", ""))
    del run.info["config_sha256"]  # later than the loggers
    run.write_info()
    assert len(trainkit.resume("run", ["epochs=5"]).history) == 5


# ---------------------------------------------------------------------------------- faults and exactness


@pytest.mark.parametrize("method", ["start", "log_epoch", "finish"])
@pytest.mark.parametrize("how", ["raise", "exit"])
def test_a_logger_that_fails_is_reported_once_and_changes_nothing(
    method: str, how: str, forked: Command, own: Path
) -> None:
    faulty = f"+logger.mine={{_target_: own.Faulty, fails: {method}, how: {how}}}"
    done = forked(*SMALL, *IN, faulty, "logger=csv", "progress=plain", HF_TOKEN="a-secret-token")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("logger.mine is off") == 1
    assert "a-secret-token" not in done.stderr + (own / "run" / "trainkit.log").read_text()
    assert_holds_history(read_csv(own / "run"), own / "run")
    assert forked(*SMALL, "hydra.run.dir=plain").returncode == 0
    assert final_state(own / "run") == final_state(own / "plain")


@pytest.mark.parametrize("method", ["start", "log_epoch", "finish"])
def test_a_logger_that_blocks_is_given_up(
    method: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in ("START_LIMIT", "EPOCH_LIMIT", "FINISH_LIMIT"):
        monkeypatch.setattr(loggers, limit, 0.2)
    began = time.monotonic()
    train_in_process("logger=csv", f"+logger.mine={{_target_: own.Faulty, fails: {method}, how: block}}")
    assert time.monotonic() - began < 500
    assert capsys.readouterr().err.count(f"logger.mine is off: TimeoutError: {method} has not returned") == 1
    assert_holds_history(read_csv(own / "run"), own / "run")


@pytest.mark.slow
def test_the_final_state_has_the_same_bits_with_all_loggers(forked: Command, own: Path) -> None:
    assert_done(forked(*SMALL, "hydra.run.dir=plain"))
    logger = "logger=[csv,tensorboard,trackio,wandb,mlflow]"
    assert_done(forked(*SMALL, *IN, logger, "+logger.mine._target_=own.Faulty", **OFFLINE))
    log = (own / "run" / "trainkit.log").read_text()
    assert "is off" not in log
    assert final_state(own / "run") == final_state(own / "plain")


def test_a_run_directory_that_a_logger_cannot_write_to_does_not_stop_the_training(own: Path) -> None:
    (own / "file").write_text("")
    run = train_in_process("logger=[csv,tensorboard]", f"logger.csv.directory={own}/file/x")
    assert run.info["status"] == "completed"
    assert "logger.csv is off: NotADirectoryError" in (own / "run" / "trainkit.log").read_text()
    assert_holds_history(read_logged("tensorboard", own / "run"), own / "run")


# ------------------------------------------------------------------------------------------- config


def test_a_missing_package_is_reported_with_its_command_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else find(name, *a))
    with pytest.raises(trainkit.ConfigError) as raised:
        trainkit.compose(["logger=[mlflow,csv]"])
    assert (
        str(raised.value)
        == "error: logger.mlflow: the package mlflow is not installed\n  install it: pip install mlflow"
    )
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("def start(self, run): ...", "has no method log_epoch"),
        ("def start(self): ...", "start is called with (run)"),
        ("async def start(self, run): ...", "start is async"),
    ],
)
def test_a_class_that_is_not_a_logger_is_a_config_error(body: str, cause: str, forked: Command, own: Path) -> None:
    (own / "own.py").write_text(f"class Mine:\n    {body}\n")
    done = forked(*LINE, "+logger.mine._target_=own.Mine")
    assert done.returncode == 2
    assert cause in done.stderr
    assert not (own / "outputs").exists()


def test_the_jobs_of_a_sweep_may_differ_in_their_loggers() -> None:
    jobs = compose_sweep(["logger=csv,[csv,tensorboard]", "seed=0,1"]).jobs
    assert [sorted(job.settings.logger) for job in jobs] == [["csv"], ["csv"], *[["csv", "tensorboard"]] * 2]


def test_a_job_of_a_sweep_is_named_after_the_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "2026-11-28" / "16-24-18"
    sweep.mkdir(parents=True)
    assert names_of(sweep) == ("2026-11-28_16-24-18", None)
    assert names_of(sweep / "3") == ("3", None)
    (sweep / "sweep.jsonl").touch()
    assert names_of(sweep / "3") == ("2026-11-28_16-24-18-3", "2026-11-28_16-24-18")

"""Sweeps and searches whose jobs train on 2 ranks: results, faults, signals, and that no process is left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.helpers import read_history
from tests.processes import Forks, Process, until
from trainkit.core.signals import is_running
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.sweeps.ledger import JobRecord, read_ledger
from trainkit.sweeps.resources import children_of
from trainkit.training.metrics import CLOCKS

JOBS = ["-m", "devices=2", "hydra.sweep.dir=S", "hydra.launcher.n_jobs=1", "progress=plain", "model=mlp"]
JOBS += ["data=synthetic", "data.train.size=210", "data.split=0.2", "batch_size=33"]

MODULE = """
import os, signal, time

class Slow:
    def on_step(self, state):
        time.sleep(0.05)

class KillOnce:
    def on_step(self, state):
        if os.environ["RANK"] == "1" and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

class GPUs:
    def on_start(self, state):
        open(f"gpus-{os.environ['RANK']}-{state.directory.name}", "w").write(os.environ["CUDA_VISIBLE_DEVICES"])
"""


def fields(folder: Path, name: str) -> list[Any]:
    """Return a field of each job in the ledger."""
    return [getattr(job, name) for job in read_ledger(folder / "S")]


def jobs(folder: Path) -> list[JobRecord]:
    """Return the jobs in the ledger."""
    return read_ledger(folder / "S")


def numbers(directory: Path) -> list[dict[str, object]]:
    """Return the rows of the history without the times."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_history(directory)]


def ranks_of(directory: Path) -> int:
    """Return how many ranks wrote the newest checkpoint of a run."""
    return int(Checkpoints(directory / "checkpoints").newest()[1]["fingerprint"]["machine"]["ranks"])


def test_each_job_trains_on_its_devices_and_a_failed_job_touches_no_other(forks: Forks, tmp_path: Path) -> None:
    sweep = forks.start(*JOBS, "lr=0.1,1e30,0.01", "epochs=2", cwd=tmp_path)
    assert sweep.wait() == 10, sweep.stderr
    assert fields(tmp_path, "status") == ["completed", "failed", "completed"]
    assert fields(tmp_path, "exit_code") == [0, 4, 0]
    log = jobs(tmp_path)[1].log.read_text()
    assert log.count("error: ") == 1
    assert "the loss is" in log
    alone = forks.run(*JOBS[5:], "devices=2", "lr=0.01", "epochs=2", "hydra.run.dir=alone", cwd=tmp_path)
    assert alone.code == 0
    assert numbers(tmp_path / "S/2") == numbers(tmp_path / "alone")
    assert [ranks_of(tmp_path / "S" / name) for name in ("0", "2")] == [2, 2]
    again = forks.start(*JOBS, "lr=0.1,0.01", "epochs=2", cwd=tmp_path)
    assert again.wait() == 0, again.stderr
    assert fields(tmp_path, "attempts") == [1, 1, 1]


def processes_of(sweep: Process) -> list[int]:
    """Return the process of a job that runs, and its ranks."""
    launcher = children_of(sweep.pid)
    ranks = [rank for pid in launcher for rank in children_of(pid)]
    return [*launcher, *ranks] if len(ranks) == 2 else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_stopped_or_killed_saves_its_job_and_leaves_no_process(
    number: int, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    slow = ["+hooks.slow._target_=mine.Slow", "epochs=4"]
    sweep = forks.start(*JOBS, *slow, "lr=0.1,0.01", cwd=tmp_path)
    history = tmp_path / "S/0/history.jsonl"
    until(lambda: history.exists() and history.read_text())
    processes = processes_of(sweep)
    assert len(processes) == 3
    sweep.send(number)
    assert sweep.wait() == (130 if number == signal.SIGINT else -number)
    until(lambda: not any(map(is_running, processes)))
    info = Run.load(tmp_path / "S/0").info
    assert (info["status"], info["exit_code"]) == ("stopped", 130 if number == signal.SIGINT else 143)
    resumed = forks.start("resume", "S", cwd=tmp_path)
    assert resumed.wait() == 0, resumed.stderr
    assert fields(tmp_path, "status") == ["completed"] * 2
    unbroken = forks.run(*JOBS[5:], *slow, "devices=2", "lr=0.1", "hydra.run.dir=alone", cwd=tmp_path)
    assert unbroken.code == 0
    assert numbers(tmp_path / "S/0") == numbers(tmp_path / "alone")
    assert ranks_of(tmp_path / "S/0") == 2


@pytest.mark.slow
def test_a_killed_rank_fails_its_job_which_retries_start_again(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    sweep = forks.start(*JOBS, "+hooks.kill._target_=mine.KillOnce", "epochs=1", "lr=0.1", "retries=1", cwd=tmp_path)
    assert sweep.wait() == 0, sweep.stderr
    assert fields(tmp_path, "attempts") == [2]
    ended = [json.loads(line) for line in (tmp_path / "S/sweep.jsonl").read_text().splitlines()]
    codes = [event["exit_code"] for event in ended if event["event"] == "ended"]
    assert codes == [137, 0]


@pytest.mark.slow
def test_fail_fast_stops_the_ranks_of_the_other_jobs(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    sweep = forks.start(
        *JOBS, "lr=0.1,1e30", "+hooks.slow._target_=mine.Slow", "epochs=500", "fail_fast=true",
        "hydra.launcher.n_jobs=2", cwd=tmp_path,
    )  # fmt: skip
    assert sweep.wait() == 10, sweep.stderr
    assert fields(tmp_path, "status") == ["stopped", "failed"]
    assert Run.load(tmp_path / "S/0").info["exit_code"] == 143


@pytest.mark.slow
def test_jobs_get_their_own_gpus(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    sweep = forks.start(
        *JOBS, "hydra.launcher.n_jobs=auto", "lr=0.1,0.01", "epochs=1", "+hooks.gpus._target_=mine.GPUs",
        cwd=tmp_path, CUDA_VISIBLE_DEVICES="4,5,6,7",
    )  # fmt: skip
    assert sweep.wait() == 0, sweep.stderr
    seen = {path.name: path.read_text() for path in tmp_path.glob("gpus-*")}
    assert seen == {"gpus-0-0": "4,5", "gpus-1-0": "4,5", "gpus-0-1": "6,7", "gpus-1-1": "6,7"}


@pytest.mark.slow
def test_a_search_stops_all_ranks_of_a_trial_and_continues_them(forks: Forks, tmp_path: Path) -> None:
    search = ["search.trials=4", "search.pruner=asha", "search.sampler=random", "search.reduction=2", "epochs=4"]
    found = forks.start(*JOBS, *search, "lr=tag(log,interval(1e-4,1e-1))", cwd=tmp_path)
    assert found.wait() == 0, found.stderr
    statuses = fields(tmp_path, "status")
    assert set(statuses) == {"completed", "paused"}
    assert all(ranks_of(job.directory) == 2 for job in jobs(tmp_path))
    for job in jobs(tmp_path):
        if job.status == "paused":
            assert Run.load(job.directory).info["status"] == "stopped"
            assert len(read_history(job.directory)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_another_launcher_runs_jobs_on_several_devices(launcher: str, trainkit: Command, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    own = [word for word in JOBS if not word.startswith("hydra.launcher")]
    done = trainkit(*own, "lr=0.1,1e30", "epochs=1", f"hydra/launcher={launcher}")
    assert done.returncode == 10, done.stderr
    assert fields(tmp_path, "status") == ["completed", "failed"]
    assert fields(tmp_path, "exit_code") == [0, 4]
    assert ranks_of(tmp_path / "S/0") == 2


def test_more_devices_than_this_machine_has_are_an_error_before_the_first_job(forks: Forks, tmp_path: Path) -> None:
    for devices, gpus in ("devices=all", ""), ("devices=1,3", "0,1"):
        sweep = forks.start(*JOBS, devices, "epochs=1", cwd=tmp_path, CUDA_VISIBLE_DEVICES=gpus)
        assert sweep.wait() == 2, sweep.stderr
        assert "this machine has" in sweep.stderr
        assert not (tmp_path / "S/0/run.json").exists()

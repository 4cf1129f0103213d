"""A sweep through the command: each job is a process, and what one job does never touches another."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SCRIPT, Command
from tests.processes import Forks, Process, until
from trainkit.runs.directory import Run
from trainkit.runs.history import History
from trainkit.runs.lock import Lock
from trainkit.sweeps.ledger import JobRecord, read_ledger

MODULE = """
import multiprocessing, os, time
import torch
from torch import nn

class Samples(torch.utils.data.Dataset):
    def __init__(self):
        self.classes = ["a", "b"]
        with open("methods", "a") as file:
            file.write(multiprocessing.get_start_method() + "\\n")

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randn(3, 8, 8), index % 2

class Net(nn.Module):
    def __init__(self, fault="none", wait=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
        self.fault, self.wait, self.calls = fault, wait, 0

    def forward(self, images):
        self.calls += 1
        time.sleep(self.wait)
        if self.calls == 14 and not os.path.exists("repaired"):
            if self.fault == "raise":
                raise ValueError("broken on purpose")
            if self.fault == "exit":
                os._exit(0)
            if self.fault == "once":
                open("repaired", "w").close()
                os._exit(3)
            if self.fault == "wait":
                time.sleep(600)
        return self.layers(images)
"""
SAMPLES = ("data.train._target_=mine.Samples", "data.num_workers=2", "data.cache=none")
BASE = ("model=mine.Net", "limit_batches=4", "hydra.sweep.dir=S")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a model that fails as it is asked to."""
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def jobs_of(folder: Path) -> list[JobRecord]:
    """Return the jobs of the sweep S in a folder."""
    return read_ledger(folder / "S")


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the sweep S in a folder."""
    return [json.loads(line) for line in (folder / "S/sweep.jsonl").read_text().splitlines()]


def files_of(directory: Path) -> dict[str, str]:
    """Return the hash of each file below a directory."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def losses_of(directory: Path) -> list[tuple[float, float]]:
    """Return the losses of each epoch, which depend on all bits of the weights."""
    return [(row["train/loss"], row["val/loss"]) for row in Run(directory).history]


def epochs_of(job: JobRecord) -> int:
    """Return the number of epochs in the history of a job."""
    return len(History(job.directory / "history.jsonl").rows)


def started_after(folder: Path, events: int) -> list[int]:
    """Return the jobs that were started after so many events."""
    return [event["job"] for event in events_of(folder)[events:] if event["event"] == "started"]


def test_faulty_jobs_touch_no_other_job_and_a_resume_runs_exactly_those(own: Path, forks: Forks) -> None:
    names = ["none", "raise", "exit", "wait", *(f"none{number}" for number in range(6))]
    process = forks.start("-m", *BASE, f"+model.fault={','.join(names)}", "epochs=4", cwd=own)
    until(lambda: len(jobs_of(own)) == 10)
    waiting = jobs_of(own)[3].directory  # the job waits in its second epoch until it is killed from outside
    until(lambda: len(History(waiting / "history.jsonl").rows) == 1, timeout=120)
    process.kill(json.loads((waiting / "run.json").read_text())["pid"], signal.SIGKILL)
    assert process.wait() == 10, process.stderr
    assert [job.status for job in jobs_of(own)] == ["completed", *["failed"] * 3, *["completed"] * 6]
    assert [job.exit_code for job in jobs_of(own)][:4] == [0, 1, 0, 137]
    summary = json.loads((own / "S/summary.json").read_text())
    assert (summary["exit_code"], summary["counts"]) == (10, {"completed": 7, "failed": 3})
    assert "3 jobs failed" in process.stderr
    assert "ValueError: broken on purpose (exit code 1); log: S/1/output.log" in process.stderr
    assert "killed by SIGKILL" in process.stderr
    assert "broken on purpose" in (own / "S/1/output.log").read_text()

    (own / "repaired").touch()
    finished = [own / "S" / str(number) for number in (0, *range(4, 10))]
    before, events = [files_of(directory) for directory in finished], len(events_of(own))
    forks.run("resume", "S", cwd=own)
    assert sorted(started_after(own, events)) == [1, 2, 3]
    assert [files_of(directory) for directory in finished] == before
    assert all(job.status == "completed" for job in jobs_of(own))
    assert json.loads((own / "S/summary.json").read_text())["exit_code"] == 0
    for job in jobs_of(own)[1:]:  # whatever happened, the bits are those of the job without a fault
        assert losses_of(job.directory) == losses_of(own / "S/0")
    assert (own / "S/attempts/1-1/run.json").exists()

    done = forks.run("resume", "S", cwd=own)
    assert len(done.stdout.splitlines()) == 12  # the table of a finished sweep
    assert started_after(own, events)[3:] == []


def test_a_larger_reordered_sweep_runs_only_what_is_missing(own: Path, forks: Forks) -> None:
    forks.run("-m", *BASE, "lr=0.1,0.2", "epochs=1", cwd=own)
    events = len(events_of(own))
    forks.run("-m", "seed=0", "epochs=1", "lr=0.3,0.2,1e-1", *BASE, "progress=plain", cwd=own)
    assert started_after(own, events) == [2]
    assert [job.overrides for job in jobs_of(own)][2][2] == "lr=0.3"
    assert sorted(path.name for path in (own / "S").iterdir() if path.is_dir()) == ["0", "1", "2"]


def test_the_process_of_a_sweep_imports_no_torch_and_files_of_the_folder_shadow_no_module(own: Path) -> None:
    (own / "random.py").write_text("raise ImportError")
    code = "import sys; from trainkit.cli.main import main; code = main(sys.argv[1:]); "
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    argv = ["-m", *BASE, "lr=0.1,0.2", "epochs=1"]
    done = subprocess.run([sys.executable, "-P", "-c", code, *argv], cwd=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [job.status for job in jobs_of(own)] == ["completed", "completed"]


def wait_for_epochs(folder: Path, process: Process, number: int, epochs: int) -> None:
    """Wait until some jobs have finished some epochs."""
    until(lambda: sum(epochs_of(job) >= epochs for job in jobs_of(folder)) >= number or process.code, timeout=120)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_all_jobs_and_a_resume_gives_the_same_bits(
    number: int, code: int, own: Path, forks: Forks
) -> None:
    sweep = ("-m", *BASE, "+model.wait=0.01", "seed=1,2", "epochs=12")
    process = forks.start(*sweep, cwd=own)
    wait_for_epochs(own, process, 2, 2)
    process.send(number)
    assert process.wait() == code, process.stderr
    assert [job.status for job in jobs_of(own)] == ["stopped", "stopped"]
    assert "to continue: trainkit resume S" in process.stderr
    assert json.loads((own / "S/summary.json").read_text())["exit_code"] == code
    assert all(0 < epochs_of(job) < 12 for job in jobs_of(own))
    forks.run("resume", "S", cwd=own)
    if number == signal.SIGTERM:
        forks.run(*sweep[:-1], "epochs=12", "hydra.sweep.dir=whole", cwd=own)
        for job in ("0", "1"):
            assert losses_of(own / "S" / job) == losses_of(own / "whole" / job)
            assert len(losses_of(own / "S" / job)) == 12


def test_jobs_of_a_killed_sweep_save_and_a_resume_continues_them(own: Path, forks: Forks) -> None:
    process = forks.start("-m", *BASE, "+model.wait=0.01", "seed=1,2", "epochs=30", cwd=own)
    wait_for_epochs(own, process, 2, 2)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    until(lambda: all("stopped by SIGTERM" in job.log.read_text() for job in jobs_of(own)))
    assert [job.status for job in jobs_of(own)] == ["running", "running"]
    until(lambda: all(Run.load(job.directory).info["status"] == "stopped" for job in jobs_of(own)))
    done = forks.run("resume", "S", cwd=own)
    assert "note: skipped" not in done.stderr
    assert all(job.status == "completed" and epochs_of(job) == 30 for job in jobs_of(own))
    assert "resumed from" in (own / "S/0/output.log").read_text()


def test_a_second_process_on_the_same_sweep_is_refused(own: Path, forks: Forks) -> None:
    forks.run("-m", *BASE, "lr=0.1,0.2", "epochs=1", cwd=own)
    lock = Lock(own / "S")
    lock.acquire()
    try:
        for command in (["resume", "S"], ["-m", *BASE, "lr=0.3,0.4", "epochs=1"]):
            process = forks.start(*command, cwd=own)
            assert process.wait() == 7, process.stderr
            assert "uses this directory" in process.stderr
    finally:
        lock.release()
    assert len(jobs_of(own)) == 2


def test_fail_fast_stops_the_sweep_at_its_first_failure(own: Path, forks: Forks) -> None:
    process = forks.start("-m", *BASE, "+model.fault=raise", "seed=range(8)", "epochs=4", "fail_fast=true", cwd=own)
    assert process.wait() == 10, process.stderr
    statuses = [job.status for job in jobs_of(own)]
    assert "queued" in statuses
    assert "failed" in statuses
    assert "completed" not in statuses
    assert len(statuses) == 8  # a resume finds the jobs that have not started


def test_a_resume_says_how_to_run_jobs_that_a_killed_sweep_has_not_queued(own: Path, forks: Forks) -> None:
    forks.run("-m", *BASE, "lr=0.1,0.2", "epochs=1", cwd=own)
    ledger = own / "S/sweep.jsonl"
    ledger.write_text("".join(line for line in ledger.read_text().splitlines(True) if "all_queued" not in line))
    done = forks.run("resume", "S", cwd=own)
    assert "trainkit -m model=mine.Net limit_batches=4 lr=0.1,0.2 epochs=1 hydra.sweep.dir=S" in done.stderr


def test_retries_run_a_failed_job_again(own: Path, forks: Forks) -> None:
    process = forks.run("-m", *BASE, "+model.fault=once,none", "epochs=4", "retries=1", cwd=own)
    assert [(job.status, job.attempts) for job in jobs_of(own)] == [("completed", 2), ("completed", 1)]
    assert "job 0 started (attempt 2)" in process.stderr
    assert losses_of(own / "S/0") == losses_of(own / "S/1")


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("epochs=9", "the jobs of a sweep keep their epochs"),
        ("lr=9", "the jobs of a sweep keep their lr"),
        ("optim.nesterov=true", "the jobs of a sweep keep their optim.nesterov"),
        ("+lr=9", "not of the form KEY=VALUE"),
        ("lr", "not of the form KEY=VALUE"),
        ("hydra.sweep.dir=T", "a resumed sweep keeps this key"),
        ("hydra.launcher.n_jobs=0", "expected a whole number above 0 or auto"),
        ("hydra.launcher.n_jobs=many", "expected a whole number above 0 or auto"),
        ("hydra.launcher.jobs_per_gpu=0", "expected a whole number above 0"),
        ("hydra.launcher.jobs=2", "hydra.launcher.jobs"),
        ("retries=-1", "retries=-1"),
    ],
)
def test_a_resume_of_a_sweep_refuses_what_its_jobs_keep(override: str, cause: str, own: Path, forked: Command) -> None:
    (own / "S/0/.hydra").mkdir(parents=True)
    events = [
        {"event": "queued", "job": 0, "config": "abc", "overrides": [], "directory": "0"},
    ]
    (own / "S/sweep.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    done = forked("resume", "S", override)
    assert done.returncode in (2, 3), done.stderr
    if "launcher.n_jobs" not in override and "jobs_per_gpu" not in override:
        assert cause in done.stderr
    assert "Traceback" not in done.stderr
    assert jobs_of(own)[0].status == "queued"


def test_a_sweep_that_has_no_job_yet_cannot_be_resumed(own: Path, forked: Command) -> None:
    (own / "S").mkdir()
    (own / "S/sweep.jsonl").write_text('{"event": "sweep", "version": 1}\n')
    done = forked("resume", "S")
    assert done.returncode == 2
    assert "stopped before its first job" in done.stderr


def test_a_job_whose_config_is_gone_is_an_error_that_names_it(own: Path, forked: Command) -> None:
    (own / "S/0").mkdir(parents=True)
    event = {"event": "queued", "job": 0, "config": "abc", "overrides": [], "directory": "0"}
    (own / "S/sweep.jsonl").write_text(json.dumps(event) + "\n")
    done = forked("resume", "S")
    assert done.returncode == 3
    assert "S/0/.hydra/config.yaml is missing" in done.stderr


def test_another_launcher_keeps_the_ledger_too(own: Path, forks: Forks) -> None:
    sweep = ("-m", *BASE, "+model.fault=none,raise", "seed=1,2", "epochs=4", "hydra/launcher=basic")
    process = forks.start(*sweep, cwd=own)
    assert process.wait() == 10, process.stderr
    assert [job.status for job in jobs_of(own)] == ["completed", "completed", "failed", "failed"]
    (own / "repaired").touch()
    events = len(events_of(own))
    forks.run(*sweep, cwd=own)
    assert started_after(own, events) == [2, 3]
    assert losses_of(own / "S/2") == losses_of(own / "S/0")
    refused = forks.start(*sweep, "retries=1", cwd=own)
    assert refused.wait() == 2
    assert "retries need trainkit's launcher" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["trainkit", "joblib"])
def test_the_data_of_a_job_is_read_by_processes_that_start_as_those_of_a_run(
    launcher: str, own: Path, forks: Forks, trainkit: Command
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    base = ("model=mine.Net", *SAMPLES, "batch_size=8", "epochs=2", "limit_batches=2")
    forks.run(*base, "seed=1", "hydra.run.dir=alone", cwd=own)
    sweep = trainkit("-m", *base, "seed=1,2", "hydra.sweep.dir=S", f"hydra/launcher={launcher}")  # without torch
    assert sweep.returncode == 0, sweep.stderr
    assert len(set((own / "methods").read_text().split())) == 1
    assert losses_of(own / "S/0") == losses_of(own / "alone")


@pytest.mark.slow
def test_a_sweep_and_its_resume_write_a_report_if_the_config_asks_for_it(own: Path, forks: Forks) -> None:
    process = forks.start("-m", *BASE, "+model.fault=none,raise", "epochs=4", "report=on", cwd=own)
    assert process.wait() == 10, process.stderr
    assert "report: S/report.html" in process.stdout
    page = (own / "S/report.html").read_text()
    assert "broken on purpose" in page
    (own / "repaired").touch()
    done = forks.run("resume", "S", "report=on", cwd=own)
    assert "report: S/report.html" in done.stdout
    assert "broken on purpose" not in (own / "S/report.html").read_text()


def test_the_exit_code_of_a_larger_sweep_is_about_the_jobs_of_its_command(own: Path, forks: Forks) -> None:
    failed = forks.start("-m", *BASE, "+model.fault=raise", "seed=1,2", "epochs=4", cwd=own)
    assert failed.wait() == 10
    grown = forks.run("-m", *BASE, "+model.fault=none", "seed=1,2", "epochs=1", cwd=own)
    assert "note: 2 other jobs of this sweep did not complete; to continue: trainkit resume S" in grown.stderr
    again = forks.run("-m", *BASE, "+model.fault=none", "seed=2,1", "epochs=1", cwd=own)
    assert "2 jobs had been completed before" in again.stderr
    assert forks.start("resume", "S", "hydra.launcher.n_jobs=x", cwd=own).wait() == 2


def test_a_job_with_an_edited_config_is_refused_and_the_others_are_resumed(own: Path, forks: Forks) -> None:
    assert forks.start("-m", *BASE, "+model.fault=none,raise,exit", "seed=1", "epochs=4", cwd=own).wait() == 10
    (own / "repaired").touch()
    config = own / "S/1/.hydra/config.yaml"
    config.write_text(config.read_text().replace("epochs: 4", "epochs: 5"))
    process = forks.start("resume", "S", cwd=own)
    assert process.wait() == 10, process.stderr
    assert "job 1 cannot be resumed:" in process.stderr
    assert [job.status for job in jobs_of(own)] == ["completed", "failed", "completed"]
    assert [job.exit_code for job in jobs_of(own)] == [0, 3, 0]


def test_jobs_that_differ_in_a_secret_all_run_and_no_file_holds_it(own: Path, forks: Forks) -> None:
    (own / "keys.py").write_text(
        "class Hook:\n    def __init__(self, api_key): pass\n    def on_end(self, state): pass\n"
    )
    hook = ("+hooks.h._target_=keys.Hook", "+hooks.h.api_key=S3CRET9one,S3CRET9two")
    forks.run("-m", *BASE, *hook, "epochs=1", cwd=own)
    assert [job.status for job in jobs_of(own)] == ["completed", "completed"]
    assert not [file for file in (own / "S").rglob("*") if file.is_file() and b"S3CRET9" in file.read_bytes()]


@pytest.mark.parametrize(
    ("subdir", "cause"),
    [
        ("../${hydra.job.num}", "is not inside the directory of the sweep"),
        ("/tmp/${hydra.job.num}", "is not inside the directory of the sweep"),
        (".", "is not inside the directory of the sweep"),
        ("${oc.env:NOT_SET}", "NOT_SET"),
    ],
)
def test_a_wrong_directory_of_jobs_is_refused_before_a_job_starts(
    subdir: str, cause: str, own: Path, forks: Forks
) -> None:
    process = forks.start("-m", *BASE, "lr=0.1,0.2", "epochs=1", f"hydra.sweep.subdir='{subdir}'", cwd=own)
    assert process.wait() == 2, process.stderr
    assert cause in process.stderr
    assert "TRAINKIT_TRACEBACK" not in process.stderr
    assert jobs_of(own) == []
    assert json.loads((own / "S/summary.json").read_text())["exit_code"] == 2


@pytest.mark.slow
def test_a_sweep_runs_if_stdin_is_closed(own: Path) -> None:
    command = f"{SCRIPT} -m {' '.join(BASE)} lr=0.1,0.2 epochs=1 <&-"
    done = subprocess.run(["bash", "-c", command], cwd=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [job.status for job in jobs_of(own)] == ["completed", "completed"]

"""Runs are found in any mix of paths, and no run is lost: each has a status with a cause."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sweeps.made_runs import make_run
from trainkit.core.errors import ConfigError
from trainkit.runs.lock import Lock
from trainkit.sweeps.collect import collect
from trainkit.sweeps.ledger import Ledger


def lock(directory: Path, pid: int) -> None:
    """Write the lock of a process."""
    (directory / ".lock").write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))


def dead_pid() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def statuses(*paths: Path) -> dict[str, tuple[str, str]]:
    """Return status and cause of each run by the name of its directory."""
    return {run.directory.name: (run.status, run.why) for run in collect(paths).runs}


def test_runs_sweeps_and_folders_may_be_mixed_and_each_run_counts_once(tmp_path: Path) -> None:
    for name in ("a/2026/0", "a/2026/10", "a/2026/2", "a/one", "b/x/y/z", "c"):
        make_run(tmp_path / name)
    paths = [tmp_path / "c", tmp_path / "a", tmp_path / "a" / "one", tmp_path / "b" / "x"]
    found = [str(run.directory.relative_to(tmp_path)) for run in collect(paths).runs]
    assert found == ["a/2026/0", "a/2026/2", "a/2026/10", "a/one", "b/x/y/z", "c"]


def test_links_hidden_folders_attempts_and_what_is_inside_a_run_are_not_searched(tmp_path: Path) -> None:
    for name in ("sweep/0", "sweep/attempts/0-1", ".hidden/0", "sweep/0/inner"):
        make_run(tmp_path / name)
    (tmp_path / "latest").symlink_to("sweep")
    Ledger(tmp_path / "sweep").append({"event": "sweep", "version": 1})
    assert [run.directory for run in collect([tmp_path]).runs] == [tmp_path / "sweep" / "0"]
    assert [run.directory for run in collect([tmp_path / "latest"]).runs] == [tmp_path / "sweep" / "0"]


def test_each_status_has_a_cause(tmp_path: Path) -> None:
    make_run(tmp_path / "completed")
    make_run(tmp_path / "failed", status="failed", why="the loss is NaN")
    make_run(tmp_path / "stopped", status="stopped", why="SIGINT")
    make_run(tmp_path / "running", status="running")
    make_run(tmp_path / "killed", status="running")
    make_run(tmp_path / "unstarted")
    (tmp_path / "unstarted" / "run.json").unlink()
    make_run(tmp_path / "strange", status="paused")
    lock(tmp_path / "running", os.getpid())
    lock(tmp_path / "killed", dead_pid())
    best = json.loads((tmp_path / "running" / "run.json").read_text())["best"]
    so_far = f"best epoch so far: {best['epoch']}, val/loss {best['value']:.4f}"
    assert statuses(tmp_path) == {
        "completed": ("completed", ""),
        "failed": ("failed", "the loss is NaN"),
        "stopped": ("stopped", "SIGINT"),
        "running": ("running", so_far),
        "killed": ("failed", "its process ended without writing a cause"),
        "unstarted": ("failed", "no training started: run.json is missing"),
        "strange": ("unreadable", "run.json: the status 'paused' is not known"),
    }


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    make_run(tmp_path, status="running")
    held = Lock(tmp_path)
    held.acquire()
    assert [run.status for run in collect([tmp_path]).runs] == ["running"]
    held.check()  # the lock is not touched
    held.release()
    assert [run.status for run in collect([tmp_path]).runs] == ["failed"]


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("run.json", b"{", "run.json is damaged: "),
        ("run.json", b"[1]", "run.json is damaged: the file does not contain a JSON object"),
        ("run.json", b'{"best": [1]}', "run.json is damaged: best is"),
        ("run.json", b"\xff\xfe", "run.json is damaged: "),
        (".hydra/config.yaml", b"a: [", "config.yaml cannot be read: "),
        (".hydra/config.yaml", b"- 1", "config.yaml cannot be read: it is not a mapping"),
        (".hydra/config.yaml", b"a: &a [1]\nb: *a", "config.yaml cannot be read: it has YAML anchors"),
        (".hydra/config.yaml", b"a: \xff", "config.yaml cannot be read: "),
        (".hydra/config.yaml", None, "config.yaml is missing"),
    ],
)
def test_a_damaged_run_is_unreadable_with_its_cause_and_hides_no_other(
    file: str, content: bytes | None, cause: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "0")
    make_run(tmp_path / "1")
    path = tmp_path / "1" / file
    path.unlink() if content is None else path.write_bytes(content)
    found = statuses(tmp_path)
    assert found["0"] == ("completed", "")
    assert found["1"][0] == "unreadable"
    assert cause in found["1"][1]


@pytest.mark.parametrize("file", [".hydra/overrides.yaml", ".hydra/hydra.yaml", "history.jsonl"])
@pytest.mark.parametrize("content", [b"[", b"\xff", b"a: {b: 1}", b""])
def test_other_damaged_files_leave_the_run_readable(file: str, content: bytes, tmp_path: Path) -> None:
    make_run(tmp_path / "0", "optim=adam")
    (tmp_path / "0" / file).write_bytes(content)
    (run,) = collect([tmp_path]).runs
    assert run.status == "completed"
    assert isinstance(run.history, list)


def events(number: int, **ended: Any) -> list[dict[str, Any]]:
    """Return the events of a job that has ended."""
    queued = {"event": "queued", "job": number, "config": f"c{number}", "overrides": [f"lr={number}"]}
    return [
        {**queued, "directory": str(number)},
        {"event": "started", "job": number, "attempt": 1},
        *([{"event": "ended", "job": number, **ended}] if ended else []),
    ]


def test_the_ledger_adds_jobs_without_a_directory_and_causes(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "lr=0")
    make_run(tmp_path / "1", "lr=1", status="running")
    jobs = [event for number in range(2) for event in events(number, status="failed", exit_code=-9, why="SIGKILL")]
    Ledger(tmp_path).append(*jobs, events(2)[0], *events(3))
    assert statuses(tmp_path) == {
        "0": ("completed", ""),  # its own files come first
        "1": ("failed", "SIGKILL"),
        "2": ("queued", "the sweep ended before it started"),
        "3": ("failed", "no training started: run.json is missing"),
    }
    lock(tmp_path, os.getpid())
    found = statuses(tmp_path)
    assert found["2"] == ("queued", "it has not started")
    assert found["3"] == ("running", "no epoch with a finite monitored value has ended")
    assert [list(run.overrides) for run in collect([tmp_path]).runs] == [["lr=0"], ["lr=1"], ["lr=2"], ["lr=3"]]


def test_a_search_may_run_while_a_process_of_it_holds_its_lock(tmp_path: Path) -> None:
    Ledger(tmp_path).append(events(0)[0])
    (tmp_path / "workers/1").mkdir(parents=True)
    lock(tmp_path / "workers/1", os.getpid())
    assert statuses(tmp_path) == {"0": ("queued", "it has not started")}
    lock(tmp_path / "workers/1", dead_pid())
    assert statuses(tmp_path) == {"0": ("queued", "the sweep ended before it started")}


@pytest.mark.parametrize("status", ["pruned", "paused"])
def test_a_run_that_a_search_stopped_has_the_status_of_the_ledger(status: str, tmp_path: Path) -> None:
    make_run(tmp_path / "0", "lr=0", status="stopped", why="the search stopped it")
    make_run(tmp_path / "1", "lr=1")
    make_run(tmp_path / "2", "lr=2", status="failed", why="the loss is NaN")
    Ledger(tmp_path).append(*(event for number in range(3) for event in events(number, status=status)))
    assert statuses(tmp_path) == {
        "0": (status, "the search stopped it"),
        "1": ("completed", ""),  # its own files come first
        "2": ("failed", "the loss is NaN"),
    }
    lock(tmp_path / "0", os.getpid())
    assert statuses(tmp_path)["0"][0] == "running"


def test_a_job_that_failed_before_its_training_adds_no_axis(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "lr=0")
    make_run(tmp_path / "1", "lr=1", "clip_norm=off")  # as asked for; the training writes null
    (tmp_path / "1/run.json").unlink()
    Ledger(tmp_path).append(*events(0, status="completed"), *events(1, status="failed", why="broken"))
    assert collect([tmp_path]).axes == []
    assert statuses(tmp_path)["1"] == ("failed", "broken")


def test_all_wrong_paths_are_reported_together_with_the_nearest_names(here: Path) -> None:
    make_run(here / "outputs" / "2026-01-01" / "07-00-00")
    (here / "empty").mkdir()
    (here / "file").touch()
    with pytest.raises(ConfigError) as caught:
        collect([Path("outputs"), Path("output/2026-01-01"), Path("empty"), Path("file")])
    text = str(caught.value)
    assert text.count("error: ") == 3
    assert "did you mean outputs?" in text
    assert "empty does not hold a run" in text
    assert "the newest here is outputs/2026-01-01/07-00-00" in text
    assert "file is a file, expected a directory" in text

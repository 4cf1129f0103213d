"""The ledger of a sweep: what was recorded is read again, whatever a crash or another program left in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainkit.core.errors import CheckpointError, StorageError
from trainkit.sweeps.ledger import Ledger, is_sweep, read_ledger

QUEUED = {"event": "queued", "job": 0, "config": "abc", "overrides": ["lr=0.1"], "directory": "0"}
STARTED = {"event": "started", "job": 0, "attempt": 1, "threads": 2}
ENDED = {
    "event": "ended",
    "job": 0,
    "status": "completed",
    "exit_code": 0,
    "why": None,
    "metric": "val/loss",
    "mode": "min",
    "value": 0.25,
    "seconds": 3.5,
}


def test_a_directory_without_a_ledger_has_no_jobs(tmp_path: Path) -> None:
    assert not is_sweep(tmp_path)
    assert read_ledger(tmp_path) == []


def test_the_state_of_a_job_follows_its_events(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    statuses = []
    for event in (QUEUED, STARTED, ENDED):
        ledger.append(event)
        statuses.append(ledger.read()[0].status)
    (job,) = read_ledger(tmp_path)
    assert statuses == ["queued", "running", "completed"]
    assert (job.number, job.config_hash, job.overrides, job.directory) == (0, "abc", ["lr=0.1"], tmp_path / "0")
    assert (job.exit_code, job.metric, job.mode, job.value, job.threads) == (0, "val/loss", "min", 0.25, 2)
    assert is_sweep(tmp_path)


def test_the_seconds_and_attempts_of_a_job_add_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, STARTED, {**ENDED, "status": "failed", "seconds": 2}, STARTED, ENDED)
    (job,) = ledger.read()
    assert (job.attempts, job.seconds, job.status) == (2, 5.5, "completed")


def test_a_job_of_a_search_has_its_trial_and_repeat(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, {**QUEUED, "job": 7, "trial": 2, "repeat": 1, "directory": "7"})
    assert [(job.number, job.trial, job.repeat) for job in ledger.read()] == [(0, None, 0), (7, 2, 1)]


def test_the_epochs_of_a_job_are_those_of_its_last_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, STARTED, {**ENDED, "status": "paused", "epochs": 3}, STARTED, {**ENDED, "epochs": 9}, ENDED)
    assert (ledger.read()[0].epochs, ledger.trained()) == (9, [(0, 3, "paused"), (0, 9, "completed")])


def test_the_settings_of_a_search_are_those_of_the_last_command(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.search() is None
    ledger.append({"event": "search", "axes": [], "pruner": "asha"}, QUEUED)
    ledger.append({"event": "search", "axes": [], "pruner": "median"}, STARTED, {"event": "search", "axes": 1})
    found = ledger.search()
    assert found is not None
    assert found["pruner"] == "median"


@pytest.mark.parametrize("status", ["pruned", "paused"])
def test_a_job_that_the_search_stopped_may_run_again(status: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    statuses = []
    for event in (QUEUED, STARTED, {**ENDED, "status": status}, STARTED, ENDED):
        ledger.append(event)
        statuses.append(ledger.read()[0].status)
    assert statuses == ["queued", "running", status, "running", "completed"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_incomplete_last_line_loses_nothing_that_follows(cut: int, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, STARTED)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    ledger.append(STARTED)
    ledger.append(ENDED)
    (job,) = ledger.read()
    assert (job.status, job.value) == ("completed", 0.25)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"event": "ended"}',
        '{"event": "started", "job": 7}',
        '{"event": "started", "job": []}',
        '{"event": "ended", "job": 0, "status": "odd"}',
        '{"event": "ended", "job": 0, "status": "failed", "seconds": {}}',
        '{"event": "queued", "job": 1, "config": 1, "overrides": 3, "directory": "1"}',
        '{"event": "queued", "job": 1, "config": "x", "overrides": [], "directory": "../../etc"}',
        '{"event": "queued", "job": 1, "config": "x", "overrides": [], "directory": "."}',
        '{"event": "queued", "job": 1, "config": "x", "overrides": [], "directory": 5}',
        "[" * 100_000,
        '{"event": "ended", "job": 0, "status": "failed", "value": 1%s}' % ("0" * 400),
        '{"event": "started", "job": Infinity}',
        '{"event": "queued", "job": 1, "config": "x", "overrides": [], "directory": "1", "trial": []}',
        "\x00\xff",
    ],
)
def test_a_damaged_line_is_skipped(line: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED)
    with ledger.path.open("a", encoding="latin-1") as file:
        file.write(f"{line}\n")
    ledger.append(STARTED, ENDED)
    (job,) = ledger.read()
    assert (job.status, job.overrides) == ("completed", ["lr=0.1"])


def test_a_command_whose_jobs_were_not_all_queued_is_found(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.find_unqueued() is None
    ledger.append({"event": "expanded", "overrides": ["lr=1,2"], "jobs": 2}, QUEUED)
    assert ledger.find_unqueued() == ["lr=1,2"]
    ledger.append({"event": "all_queued"})
    assert ledger.find_unqueued() is None


def test_a_job_that_is_queued_twice_counts_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, STARTED, QUEUED)
    assert [job.status for job in ledger.read()] == ["running"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_each_line_is_strict_json(value: float, tmp_path: Path) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, STARTED, {**ENDED, "value": value})
    for line in ledger.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert ledger.read()[0].value is None


def test_the_summary_holds_each_job(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(QUEUED, STARTED, ENDED, {**QUEUED, "job": 1, "config": "def", "directory": "1"})
    ledger.write_summary("failed", 10)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("failed", 10)
    assert summary["counts"] == {"completed": 1, "queued": 1}
    assert [(job["number"], job["status"], job["directory"], job["log"]) for job in summary["jobs"]] == [
        (0, "completed", "0", "0/output.log"),
        (1, "queued", "1", "1/output.log"),
    ]


def test_a_ledger_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="it is a link"):
        read_ledger(tmp_path)


def test_a_ledger_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Ledger(tmp_path / "missing").append(QUEUED)

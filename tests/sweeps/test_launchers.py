"""Sweeps through other launchers of Hydra: the ledger is as complete as with trainkit's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Command
from trainkit.runs.directory import Run
from trainkit.sweeps.ledger import JobRecord, read_ledger

MODULE = """
import os
from torch import nn

class Net(nn.Module):
    def __init__(self, fault="none"):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
        self.fault, self.calls = fault, 0

    def forward(self, images):
        self.calls += 1
        if self.fault == {1: "first", 3: "third"}.get(self.calls) and not os.path.exists("repaired"):
            raise ValueError("broken on purpose")
        return self.layers(images)
"""
SWEEP = ("-m", "model=mine.Net", "+model.fault=none,first,no,third", "epochs=1", "limit_batches=1", "progress=off")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_another_launcher_runs_a_sweep_with_a_complete_ledger(launcher: str, trainkit: Command, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    (tmp_path / "mine.py").write_text(MODULE)
    sweep = (*SWEEP, f"hydra/launcher={launcher}", "hydra.sweep.dir=S")

    done = trainkit(*sweep)
    assert done.returncode == 10, done.stderr
    assert "2 jobs failed" in done.stderr
    assert _fields(tmp_path, "status") == ["completed", "failed", "completed", "failed"]
    assert _fields(tmp_path, "exit_code") == [0, 2, 0, 1]
    assert _fields(tmp_path, "overrides") == [
        ["model=mine.Net", f"+model.fault={fault}", *SWEEP[3:]] for fault in ("none", "first", "no", "third")
    ]
    for job in _jobs(tmp_path):
        if job.status == "failed":
            assert "ValueError: broken on purpose" in str(job.why)
            assert "ValueError: broken on purpose" in job.log.read_text()
        else:
            assert job.value == Run.load(job.directory).info["best"]["value"]
    assert json.loads((tmp_path / "S/summary.json").read_text())["counts"] == {"completed": 2, "failed": 2}

    (tmp_path / "repaired").touch()
    before, events = _files(tmp_path / "S/0") | _files(tmp_path / "S/2"), len(_events(tmp_path))
    again = trainkit(*sweep)
    assert again.returncode == 0, again.stderr
    assert [event["job"] for event in _events(tmp_path)[events:] if event["event"] == "started"] == [1, 3]
    assert _files(tmp_path / "S/0") | _files(tmp_path / "S/2") == before
    assert _fields(tmp_path, "status") == ["completed"] * 4
    losses = [Run.load(job.directory).history[-1]["train/loss"] for job in _jobs(tmp_path)]
    assert losses == losses[:1] * 4  # the faults change no bits
    assert sorted(path.name for path in (tmp_path / "S").iterdir() if path.name.isdecimal()) == list("0123")


def _jobs(folder: Path) -> list[JobRecord]:
    return read_ledger(folder / "S")


def _fields(folder: Path, name: str) -> list[object]:
    return [getattr(job, name) for job in _jobs(folder)]


def _events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "S/sweep.jsonl").read_text().splitlines()]


def _files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

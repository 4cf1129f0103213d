"""Killed runs on streams resume to the same bits, with and without a `state_dict`, for each number of workers."""

from __future__ import annotations

import gzip
import io
import json
import signal
import tarfile
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.engine.test_length import final
from tests.helpers import KILL_MODULE, read_history
from tests.processes import Forks

slow = pytest.mark.slow
MODULE = (
    KILL_MODULE
    + """
import os, random, signal
import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 3))

class Plain:
    classes = 3

    def __init__(self, size=37):
        self.size = size

    def set_epoch(self, number):
        self.number = number

    def sample(self, index):
        return torch.tensor([index + self.number, random.random(), np.random.rand()]) + torch.rand(3), index % 3

    def __iter__(self):
        return map(self.sample, range(self.size))

class Stateful(Plain):
    used = 0

    def __iter__(self):
        while self.used < self.size:
            self.used += 1
            yield self.sample(self.used - 1)
        self.used = 0

    def state_dict(self):
        return {"used": self.used, "list": [1, 2.5, None]}

    def load_state_dict(self, state):
        self.used = state["used"]

class Shares(IterableDataset, Stateful):  # as torch's documentation divides a stream
    shards_itself = True

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        while first + self.used * step < self.size:
            self.used += 1
            yield self.sample(first + (self.used - 1) * step)

class StatelessShares(Shares):
    state_dict = load_state_dict = None

def to_pair(row):
    return {"inputs": torch.tensor(row["x"]), "targets": row["y"]}

def hf(files, shuffle=False, stateless=False):
    import datasets
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True).map(to_pair)
    rows = rows.remove_columns(["x", "y"]).with_format("torch")
    return rows.shuffle(seed=3, buffer_size=8) if shuffle else rows

def tar(files, shuffle=False):
    import webdataset
    rows = webdataset.WebDataset(files, shardshuffle=False, empty_check=False)
    rows = rows.compose(webdataset.detshuffle(8, 8)) if shuffle else rows
    return rows.decode().to_tuple("x.json", "y.json").map_tuple(torch.tensor, lambda y: y)
"""
)
BASE = [
    "model._target_=streammodule.Net",
    "data=digits",
    "data.split=off",
    "data.normalize=null",
    "batch_size=5",
    "progress=plain",
]
BASE += ["optim=sgd", "optim.momentum=0.9", "lr=0.001", "report=off", "steps=24", "checkpoint.every_steps=1"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with streams, and with the same samples in files."""
    (tmp_path / "streammodule.py").write_text(MODULE)
    for shard in range(2):
        rows = [{"x": [shard + n / 9, n % 4, 1.0], "y": n % 3} for n in range(17)]
        with gzip.open(tmp_path / f"rows{shard}.jsonl.gz", "wt") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        with tarfile.open(tmp_path / f"rows{shard}.tar", "w") as tar:
            for number, row in enumerate(rows):
                for key, value in row.items():
                    content = json.dumps(value).encode()
                    member = tarfile.TarInfo(f"{number:04d}.{key}.json")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


def kill_and_resume(command: Command, forks: Forks, own: Path, step: int, *overrides: str) -> str:
    """Compare an uninterrupted run with one that is killed after a step; return the output of the resume."""
    done = command(*BASE, *overrides, "hydra.run.dir=straight")
    assert done.returncode == 0, done.stderr
    kill = f"+hooks.kill={{_target_: streammodule.Kill, step: {step}}}"
    process = forks.start(*BASE, *overrides, kill, "hydra.run.dir=resumed", cwd=own)
    assert process.wait() == -signal.SIGKILL, process.stderr
    done = command("resume", "resumed", "~hooks.kill")
    assert done.returncode == 0, done.stderr
    assert final(own / "resumed") == final(own / "straight")
    return done.stdout + done.stderr


# 8 batches in a pass. The newest checkpoint is that of the step before the kill: step 8 ends a pass, 12 an epoch.
@pytest.mark.parametrize("step", [12, *(pytest.param(step, marks=slow) for step in (1, 6, 9, 13, 17))])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=slow)])
@pytest.mark.parametrize("kind", ["Plain", "Stateful"])
def test_a_killed_run_on_a_stream_resumes_to_the_same_bits(
    kind: str, workers: int, step: int, forked: Command, forks: Forks, own: Path
) -> None:
    more = [f"data.train._target_=streammodule.{kind}", "steps_per_epoch=6", f"data.num_workers={workers}"]
    text = kill_and_resume(forked, forks, own, step, *more)
    skips = kind == "Plain" and (step - 1) % 8 != 0
    assert ("it has no state_dict, so the first" in text) == skips


@pytest.mark.parametrize(
    ("target", "note"),
    [
        ("Shares", None),
        pytest.param("StatelessShares", "it has no state_dict", marks=slow),
        pytest.param("hf", None, marks=slow),
        pytest.param("hf, shuffle: true", "its state_dict leaves out the shuffle buffer", marks=slow),
        pytest.param("tar", "it has no state_dict", marks=slow),
        pytest.param("tar, shuffle: true", "it has no state_dict", marks=slow),
    ],
)
@pytest.mark.parametrize("step", [12, pytest.param(9, marks=slow)])
@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=slow)])
def test_a_killed_run_on_shares_of_workers_resumes_to_the_same_bits(
    workers: int, step: int, target: str, note: str | None, forked: Command, forks: Forks, own: Path
) -> None:
    name, _, more = target.partition(", ")
    files = {"hf": "rows*.jsonl.gz", "tar": "rows{0..1}.tar"}.get(name)
    if name in ("hf", "tar"):
        pytest.importorskip({"hf": "datasets", "tar": "webdataset"}[name])
        more = f"{more}, files: '{own / str(files)}'".removeprefix(", ")
    node = f"data.train={{_target_: streammodule.{name}, {more}}}".replace(", }", "}")
    text = kill_and_resume(forked, forks, own, step, node, "steps_per_epoch=6", f"data.num_workers={workers}")
    if step == 12:  # the end of a pass may need no reading
        assert note is None or f"note: data.train: {note}, so the first" in text
    assert note is not None or "read again" not in text


def test_workers_without_a_shard_are_reported_once(forked: Command, own: Path) -> None:
    pytest.importorskip("datasets")
    node = f"data.train={{_target_: streammodule.hf, files: '{own}/rows0.jsonl.gz'}}"
    done = forked(*BASE, node, "steps_per_epoch=6", "data.num_workers=2")
    assert done.returncode == 0, done.stderr
    assert "read by 2 workers, 1 of which has a share: the set has 1 shard" in done.stderr
    assert "Too many dataloader workers" not in done.stderr


@slow
def test_the_number_of_workers_changes_no_number_of_a_stream(forked: Command, own: Path) -> None:
    results = []
    for workers in (0, 1, 2, 3):
        more = ["data.train._target_=streammodule.Plain", "data.val={_target_: streammodule.Plain, size: 23}"]
        name = f"hydra.run.dir=run{workers}"
        done = forked(*BASE, *more, "steps_per_epoch=6", f"data.num_workers={workers}", name)
        assert done.returncode == 0, done.stderr
        results.append(final(own / f"run{workers}"))
    assert all(result == results[0] for result in results)
    assert results[0][1][-1]["val/loss"] > 0


@slow
def test_a_set_that_shards_itself_needs_the_same_number_of_workers(forked: Command, own: Path) -> None:
    more = ["data.train._target_=streammodule.Shares", "steps_per_epoch=6", "data.num_workers=2", "steps=8"]
    assert forked(*BASE, *more, "hydra.run.dir=run").returncode == 0
    done = forked("resume", "run", "steps=20", "data.num_workers=0")
    assert done.returncode == 3
    assert "training workers (data.num_workers)): 2 in the checkpoint, 1 now" in done.stderr
    done = forked("resume", "run", "steps=20", "data.num_workers=0", "resume.allow=[data]")
    assert done.returncode == 0, done.stderr
    assert "starts again, as its batches have changed" in done.stdout + done.stderr
    assert read_history(own / "run")[-1]["step"] == 20

"""Trainings on a stream with several ranks are killed, and resume to the same bits."""

from __future__ import annotations

import contextlib
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.helpers import Ended, largest_difference, run_ranks, start_ranks
from tests.helpers import read_history
from tests.processes import Forks, until
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import digest

STREAM = """
import random

import torch
from torch.utils.data import IterableDataset, get_worker_info

class Rows(IterableDataset):
    "Rows with noise from the global generators, which may divide themselves among workers."

    def __init__(self, divided=False):
        self.shards_itself = divided

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        for index in range(first, 45, step):
            yield torch.randn(4) + index % 3 + random.random(), index % 3
"""
BASE = ["data.train._target_=streams.Rows", "data.split=off", "steps_per_epoch=9", "epochs=3", "batch_size=8"]
MODEL = ["model._target_=torch.nn.Linear", "model.in_features=4", "model.out_features=3", "monitor.metric=train/loss"]
OPTIONS = ["data.classes=3", "checkpoint.every_steps=1", "report=off", "progress=off"]
TRAIN = [*BASE, *MODEL, *OPTIONS]
DIVIDED = ["+data.train.divided=true"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the stream."""
    (tmp_path / "streams.py").write_text(STREAM)
    return tmp_path


def last_state(folder: Path) -> dict[str, Any]:
    """Return the content of the newest checkpoint of a run."""
    saved = Checkpoints(folder / "checkpoints").newest()[1]
    assert saved is not None
    return saved


def check_ended(ended: Ended) -> None:
    """Check the exit codes."""
    assert set(ended.codes) == {0}, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], DIVIDED], ids=["whole", "divided"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_on_two_ranks_that_is_killed_resumes_to_the_same_bits(
    forks: Forks, folder: Path, workers: int, options: list[str]
) -> None:
    argv = [*TRAIN, *options, f"data.num_workers={workers}"]
    check_ended(run_ranks(forks, 2, *argv, "hydra.run.dir=complete", cwd=folder))
    rng, argv = random.Random(workers), [*argv, "hydra.run.dir=killed"]
    for kill in range(2):
        running, log = start_ranks(forks, 2, *argv, cwd=folder), folder / "killed" / "trainkit.log"
        step = 5 + 11 * kill + rng.randrange(5)
        until(lambda log=log, step=step: log.exists() and f"saved step-{step:08d}" in log.read_text(), timeout=120)
        for process in running.processes[:: rng.choice([1, -1])]:
            with contextlib.suppress(ProcessLookupError):
                process.send(signal.SIGKILL)
        running.wait()
        argv = ["resume", "killed"]
    check_ended(run_ranks(forks, 2, *argv, cwd=folder))
    assert digest(last_state(folder / "killed")) == digest(last_state(folder / "complete"))


@pytest.mark.slow
def test_a_stream_moves_to_another_number_of_ranks_only_if_the_ranks_do_not_divide_it(
    forks: Forks, folder: Path
) -> None:
    check_ended(run_ranks(forks, 1, *TRAIN, "hydra.run.dir=alone", cwd=folder))
    part = ["epochs=off", "steps=13"]
    for name, options in (("whole", []), ("divided", DIVIDED)):
        check_ended(run_ranks(forks, 2, *TRAIN, *options, *part, f"hydra.run.dir={name}", cwd=folder))
    check_ended(run_ranks(forks, 3, "resume", "whole", "steps=20", cwd=folder))
    check_ended(run_ranks(forks, 1, "resume", "whole", "steps=off", "epochs=3", cwd=folder))
    moved, alone = last_state(folder / "whole"), last_state(folder / "alone")
    assert largest_difference(moved["model"], alone["model"]) < 1e-5
    losses = [[row["train/loss"] for row in read_history(folder / name)] for name in ("whole", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    refused = run_ranks(forks, 1, "resume", "divided", "steps=20", cwd=folder)
    assert refused.codes == [3]
    assert "training workers (data.num_workers)" in refused.stderr[0]
    check_ended(run_ranks(forks, 1, "resume", "divided", "steps=20", "resume.allow=[data]", cwd=folder))

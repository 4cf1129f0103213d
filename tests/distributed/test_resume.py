"""A run on several ranks that is killed and resumed has the bits of an unbroken run; another number, its numbers."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import has_temporary_file
from benchmarks.random_training import Final, differences_of, draw_config, final_of, write_project
from tests.distributed.helpers import Ended, largest_difference, run_ranks, start_ranks
from tests.helpers import read_history
from tests.processes import Forks, until
from trainkit.cli.main import main
from trainkit.runs.checkpoint import Checkpoints
from trainkit.training.metrics import CLOCKS

slow = pytest.mark.slow
BASE = ["data=points", "batch_size=8", "epochs=3", "progress=plain"]
NET = ["model=net", *BASE, "checkpoint.every_steps=3"]
DIGITS = ["limit_batches=5", "epochs=4", "progress=plain", "checkpoint.every_steps=2"]
ON = "on: [train, val]"
FREEZE = "+param_groups.body={module: [conv1, conv2], freeze: 2, lr_mult: 0.1}"
FROZEN = "+param_groups.body={module: [conv1, conv2], freeze: true}"
RUNS = {
    "everything": [
        *NET,
        "optim=adamw",
        "scheduler=onecycle",
        "ema=0.9",
        "clip_norm=1",
        "micro_batch=3",
        "metrics=classification",
        "+metrics.f1.on=[train,val]",
        f"+metrics.confidence={{_target_: campaignmodule.Confidence, {ON}}}",
        "+hooks.trained._target_=campaignmodule.Trained",
        "monitor.metric=val/f1",
    ],
    "workers": [*NET, "data.num_workers=2", "data.cache=none", "optim=nadam", "scheduler=plateau"],
    "step with a state": [*NET, "training_step={_target_: killmodule.Queue}"],
    "augmentation": [
        *DIGITS,
        "data.augment.flip=random",
        "data.augment.mixup=0.4",
        "early_stop.patience=2",
        "early_stop.min_delta=1",
    ],
    "freeze": [*DIGITS, "optim=adamw", "ema=0.9", FREEZE],
    "trainable": [*DIGITS, FROZEN, "checkpoint.weights=trainable", "init_from=base", "ema=0.9"],
    "minutes": [*NET, "checkpoint.every_steps=off", "checkpoint.every_minutes=0.002", "steps=20", "epochs=off"],
    "async": [*NET, "checkpoint.async=on", "optim=adamw", "ema=0.9"],
    "rollback": [*NET, "on_nonfinite=rollback", "+data.train.bad=30"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models, the data and the hooks of the trainings."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    shutil.copy(Path(__file__).with_name("killmodule.py"), folder)
    return folder


@pytest.fixture(scope="module")
def straight(project: Path, forks: Forks) -> Callable[[str], Final]:
    """Return a function that returns the end of an unbroken training of `RUNS` on 2 ranks."""

    @functools.cache
    def train(name: str) -> Final:
        if "init_from=base" in RUNS[name]:
            completed(run_ranks(forks, 1, *DIGITS, "epochs=1", "hydra.run.dir=base", cwd=project))
        folder = f"straight {name}"
        completed(run_ranks(forks, 2, *RUNS[name], f"hydra.run.dir={folder!r}", cwd=project))
        return final_of(project / folder)

    return train


def completed(ended: Ended) -> Ended:
    """Check that all ranks have completed."""
    assert set(ended.codes) == {0}, "\n".join(ended.stderr)
    return ended


def killed(ended: Ended) -> None:
    """Check that a rank was killed, and that no rank has completed."""
    assert -signal.SIGKILL in ended.codes, "\n".join(ended.stderr)
    assert 0 not in ended.codes, "\n".join(ended.stderr)


MATRIX: list[Any] = [
    ("everything", "step", 13, "null"),
    ("step with a state", "validation", 3, "1"),
    *(
        pytest.param(name, moment, count, rank, marks=slow)
        for name, moment, count, rank in [
            ("everything", "update", 11, "1"),
            ("everything", "writing", 6, "0"),
            ("everything", "validation", 5, "null"),
            ("workers", "step", 12, "0"),
            ("step with a state", "update", 5, "null"),
            ("augmentation", "step", 8, "null"),
            ("freeze", "step", 9, "1"),
            ("trainable", "update", 12, "null"),
            ("minutes", "step", 14, "null"),
            ("async", "writing", 5, "0"),
            ("async", "step", 13, "1"),
            ("rollback", "step", 12, "null"),
        ]
    ),
]


@pytest.mark.parametrize(("name", "moment", "count", "rank"), MATRIX)
def test_killed_ranks_resume_to_the_same_bits(
    name: str, moment: str, count: int, rank: str, project: Path, forks: Forks, straight: Callable[[str], Final]
) -> None:
    wanted = straight(name)
    run = project / f"{name} {moment} {count}"
    hook = f"+hooks.kill={{_target_: killmodule.Kill, moment: {moment}, count: {count}, rank: {rank}}}"
    killed(run_ranks(forks, 2, *RUNS[name], hook, f"hydra.run.dir={run.name!r}", cwd=project))
    completed(run_ranks(forks, 2, "resume", run.name, "~hooks.kill", cwd=project))
    assert final_of(run) == wanted


def kill_at_random_moments(
    draw: random.Random, argv: list[str], run: Path, kills: int, length: float, forks: Forks
) -> int:
    """Train a run on 2 ranks, kill it up to `kills` times and resume it each time; return the number of kills."""
    done = 0
    for number in range(kills + 1):
        started = (run / "run.json").exists() or (run / "checkpoints").exists()
        words = ["resume", run.name] if started else [*argv, f"hydra.run.dir={run.name}"]
        ranks = start_ranks(forks, 2, *words, cwd=run.parent)
        if number == kills:
            completed(ranks.wait())
            break
        if draw.random() < 0.3:
            with contextlib.suppress(TimeoutError):
                until(lambda: has_temporary_file(run), timeout=length, interval=0.0002)
        else:
            time.sleep(draw.uniform(0, length))
        victims = draw.choice([[0, 1], [0], [1]])
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):
                ranks.processes[rank].send(signal.SIGKILL)
        ended = ranks.wait(5)  # a rank that waits for its first contact with a dead rank needs torchrun to end it
        done += -signal.SIGKILL in ended.codes
        if ended.codes == [0, 0]:
            break
    return done


@slow
def test_kills_at_random_moments_change_no_bit(project: Path, forks: Forks) -> None:
    """Train random configs on 2 ranks; kill one rank or both."""
    draw, kills, number = random.Random(time.time_ns()), 0, 0
    while kills < 12:
        number += 1
        argv = draw_config(draw, by_steps=True)
        if any("Carrying" in word for word in argv):  # several ranks do not train it
            continue
        began = time.monotonic()
        ended = run_ranks(forks, 2, *argv, f"hydra.run.dir=whole{number}", cwd=project)
        length = time.monotonic() - began
        if ended.codes[0] in (2, 4):  # the drawn config is refused, or its validation is not finite
            continue
        completed(ended)
        run = project / f"random{number}"
        kills += kill_at_random_moments(draw, argv, run, 3, length, forks)
        assert not differences_of(final_of(run), final_of(project / f"whole{number}")), argv


# -------------------------------------------------------------------------------- another number of ranks


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), pytest.param("float64", 1e-12, marks=slow)])
def test_a_run_moves_between_numbers_of_ranks_in_the_middle_of_an_epoch(
    dtype: str, tolerance: float, project: Path, forks: Forks
) -> None:
    argv = ["model=net", "model._target_=killmodule.Linear", "~model.width", f"+model.dtype={dtype}", *BASE]
    argv += ["data.train._target_=killmodule.Points", "data.val._target_=killmodule.Points", "optim=sgd", "ema=0.9"]
    argv += ["metrics=classification", "+metrics.f1.on=[train,val]", "optim.momentum=0.9"]
    run, alone = project / f"moved {dtype}", project / f"alone {dtype}"
    completed(run_ranks(forks, 1, *argv, f"hydra.run.dir={alone.name!r}", cwd=project))
    stop = f"+hooks.kill={{_target_: killmodule.Kill, moment: update, count: 4, rank: 1, number: {signal.SIGTERM}}}"
    stopped = run_ranks(forks, 2, *argv, stop, f"hydra.run.dir={run.name!r}", cwd=project)
    assert stopped.codes == [143, 143], "\n".join(stopped.stderr)
    kill = [f"hooks.kill.number={signal.SIGKILL}", "hooks.kill.rank=0", "hooks.kill.count=7"]
    one = run_ranks(forks, 1, "resume", run.name, *kill, "checkpoint.every_steps=2", cwd=project)
    assert one.codes == [-signal.SIGKILL], one.stderr
    assert "note: ranks was 2, and is 1: equal only up to rounding" in one.stderr[0]
    four = completed(run_ranks(forks, 4, "resume", run.name, "~hooks.kill", cwd=project))
    assert "note: ranks was 1, and is 4: equal only up to rounding" in four.stderr[0]
    assert [row["epoch"] for row in read_history(run)] == [1, 2, 3]
    assert largest_difference(without_clocks(run), without_clocks(alone)) < tolerance
    found, wanted = (Checkpoints(folder / "checkpoints").newest()[1] for folder in (run, alone))
    for key in ("model", "ema", "optimizers", "metrics", "best", "epoch", "batch", "step", "early_stop"):
        assert largest_difference(plain(found[key]), plain(wanted[key])) < tolerance, key


def plain(value: Any) -> Any:
    """Return a part of a checkpoint without clocks."""
    return {key: plain(item) for key, item in value.items() if key not in CLOCKS} if isinstance(value, dict) else value


def without_clocks(run: Path) -> list[Any]:
    """Return the history of a run without clocks."""
    return [plain(row) for row in read_history(run)]


# ---------------------------------------------------------------------------------------- the run directory


def test_only_rank_0_reads_and_writes_the_run_directory(project: Path, forks: Forks) -> None:
    if not may_mount():
        pytest.skip("only who may mount can hide a folder from a process")
    hidden = project / "hidden"
    hidden.mkdir()
    call = "tests.distributed.test_resume:command_without_folder"
    run = str(hidden / "run")
    for words in ([*NET, "epochs=1", f"hydra.run.dir={run}"], ["resume", run, "epochs=2"], ["resume", run]):
        completed(start_ranks(forks, 2, *words, cwd=project, call=call, HIDDEN=str(hidden)).wait())
    assert [row["epoch"] for row in read_history(Path(run))] == [1, 2]


def may_mount() -> bool:
    """Return whether a process may have mounts of its own."""
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


def command_without_folder() -> int:
    """Run the command; each rank but rank 0 sees an empty file system, which cannot be written, in a folder."""
    if os.environ["RANK"] != "0":
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x00020000) == 0  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", os.environ["HIDDEN"]], check=True)
    return main(sys.argv[1:])


def test_a_second_start_on_the_same_run_directory_is_refused_on_all_ranks(project: Path, forks: Forks) -> None:
    argv = [*NET, "epochs=999", "hydra.run.dir=used"]
    first = start_ranks(forks, 2, *argv, cwd=project)
    until(lambda: Checkpoints(project / "used" / "checkpoints").names())
    for words in (argv, ["resume", "used"]):
        second = run_ranks(forks, 2, *words, cwd=project)
        assert second.codes == [7, 7], second.stderr
        assert "used" in second.stderr[0]
    for process in first.processes:
        process.send(signal.SIGTERM)
    assert first.wait().codes == [143, 143]
    assert json.loads((project / "used" / "run.json").read_text())["status"] == "stopped"


def test_a_sweep_is_not_resumed_by_torchrun(project: Path, forks: Forks) -> None:
    (project / "sweep").mkdir()
    (project / "sweep" / "sweep.jsonl").touch()
    ended = run_ranks(forks, 2, "resume", "sweep", cwd=project)
    assert ended.codes == [2, 2]
    assert "sweep is a sweep, and torchrun starts a single training" in ended.stderr[0]
    assert "write trainkit resume sweep without torchrun" in ended.stderr[0]

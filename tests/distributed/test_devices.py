"""The key `devices` starts the ranks: results, exit codes, signals, and that no process is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import trainkit
from tests.distributed.helpers import TIMEOUT, run_ranks
from tests.helpers import read_history
from tests.processes import Forks, Process, has_ended, until
from trainkit.core.errors import ConfigError
from trainkit.core.machine import cores
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.sweeps.resources import children_of
from trainkit.training.metrics import CLOCKS

TRAINING = ["model=mlp", "data=synthetic", "data.train.size=210", "data.split=0.2", "batch_size=33", "progress=plain"]

MODULE = """
import os, time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

    def forward(self, images):
        if os.environ["RANK"] == "1" and self.training:
            raise RuntimeError("broken on purpose")
        return self.layers(images)

class Slow:
    def on_step(self, state):
        time.sleep(0.05)

class Threads:
    def on_start(self, state):
        open(f"threads{os.environ['RANK']}", "w").write(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
"""


def finish(process: Process) -> int:
    """Return the exit code of a command, which is killed after the timeout."""
    timer = threading.Timer(TIMEOUT, process.send, (signal.SIGKILL,))
    timer.start()
    try:
        return process.wait()
    finally:
        timer.cancel()


def numbers(directory: Path) -> list[dict[str, object]]:
    """Return the rows of the history without the times."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_history(directory)]


def ranks_of_checkpoint(directory: Path) -> int:
    """Return how many ranks wrote the newest checkpoint."""
    return int(Checkpoints(directory / "checkpoints").newest()[1]["fingerprint"]["machine"]["ranks"])


def test_devices_trains_as_the_ranks_of_torchrun_and_a_resume_keeps_their_number(forks: Forks, tmp_path: Path) -> None:
    started = forks.start(*TRAINING, "epochs=2", "devices=2", "hydra.run.dir=two", cwd=tmp_path)
    assert finish(started) == 0, started.stderr
    assert started.stdout.count("best of 2 epochs") == 1
    assert started.stderr.count("epoch 2/2") == 1
    reference = run_ranks(forks, 2, *TRAINING, "epochs=2", "hydra.run.dir=reference", cwd=tmp_path)
    assert reference.codes == [0, 0], reference.stderr
    assert numbers(tmp_path / "two") == numbers(tmp_path / "reference")

    for overrides, ranks in (["epochs=3"], 2), (["epochs=4", "devices=1"], 1):
        resumed = forks.start("resume", "two", *overrides, cwd=tmp_path)
        assert finish(resumed) == 0, resumed.stderr
        assert ranks_of_checkpoint(tmp_path / "two") == ranks
    assert [row["epoch"] for row in numbers(tmp_path / "two")] == [1, 2, 3, 4]


def test_the_cores_are_divided_among_the_processes_unless_the_user_sets_the_threads(
    forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    short = ["epochs=1", "limit_batches=1", "devices=2", "+hooks.threads._target_=mine.Threads"]
    share = max(1, cores() // 2)
    for given, threads in ("", share), ("2", 2):
        started = forks.start(*TRAINING, *short, cwd=tmp_path, OMP_NUM_THREADS=given)
        assert finish(started) == 0, started.stderr
        assert [(tmp_path / f"threads{rank}").read_text() for rank in (0, 1)] == [f"{threads} {threads}"] * 2


@pytest.mark.parametrize(
    ("overrides", "code", "cause"),
    [
        (["lr=1e30"], 4, "the loss is"),
        (["model=mine.Net"], 2, "RuntimeError: broken on purpose"),
        (["model=mlp", "data=image_folder", "data.root=nowhere"], 5, "nowhere"),
        (["devices=all"], 2, "devices=all: this machine has no NVIDIA GPU"),
        (["devices=0"], 2, "devices=0"),
        (["device=cuda:0"], 2, "devices=2: device=cuda:0 is a single device"),
        (["device=cpu", "devices=all"], 2, "devices=all: it means all GPUs, and device=cpu uses none"),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_and_its_error_is_printed_once(
    overrides: list[str], code: int, cause: str, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    started = forks.start(
        *TRAINING, "epochs=2", "devices=2", "hydra.run.dir=run", *overrides, cwd=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert finish(started) == code, started.stderr
    errors = [line for line in started.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, started.stderr
    assert cause in errors[0]
    if (tmp_path / "run").exists():
        info = Run.load(tmp_path / "run").info
        assert (info["status"], info["exit_code"]) == ("failed", code)


@contextmanager
def two_slow_ranks(forks: Forks, folder: Path) -> Iterator[tuple[Process, list[int]]]:
    """Start a training on 2 ranks; yield the command and the processes of the ranks after the first steps."""
    (folder / "mine.py").write_text(MODULE)
    slow = "+hooks.slow._target_=mine.Slow"
    started = forks.start(*TRAINING, "epochs=1000", "devices=2", slow, "hydra.run.dir=run", cwd=folder)
    ranks: list[int] = []
    try:
        until(
            lambda: started.out.with_suffix(".err").exists() and "epoch    1/1000" in started.stderr,
            timeout=TIMEOUT / 2,
        )
        ranks = children_of(started.pid)
        assert len(ranks) == 2
        yield started, ranks
    finally:
        for pid in (started.pid, *ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("launcher", signal.SIGTERM, 143),
        pytest.param("launcher", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param("rank 0", signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("rank 1", signal.SIGTERM, 143),
    ],
)
def test_a_signal_to_any_process_stops_all_with_a_checkpoint(
    target: str, number: int, code: int, forks: Forks, tmp_path: Path
) -> None:
    with two_slow_ranks(forks, tmp_path) as (started, ranks):
        os.kill({"launcher": started.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[target], number)
        assert finish(started) == code
        until(lambda: all(map(has_ended, ranks)))
    name = signal.Signals(number).name
    lines = [line for line in started.stderr.splitlines() if line.startswith("stopped by")]
    assert len(lines) == 1, started.stderr
    assert lines[0].startswith(f"stopped by {name}, saved as step-")
    saved = Checkpoints(tmp_path / "run/checkpoints").newest()[0]
    assert saved in lines[0]
    assert Run.load(tmp_path / "run").info["status"] == "stopped"


@pytest.mark.slow
def test_the_ranks_of_a_killed_launcher_save_and_end(forks: Forks, tmp_path: Path) -> None:
    with two_slow_ranks(forks, tmp_path) as (started, ranks):
        started.send(signal.SIGKILL)
        assert finish(started) == -signal.SIGKILL
        until(lambda: all(map(has_ended, ranks)))
    assert "stopped by SIGTERM, saved as step-" in started.stderr
    info = Run.load(tmp_path / "run").info
    assert (info["status"], info["exit_code"]) == ("stopped", 143)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_training_and_is_named(lost: int, forks: Forks, tmp_path: Path) -> None:
    with two_slow_ranks(forks, tmp_path) as (started, ranks):
        os.kill(ranks[lost], signal.SIGKILL)
        assert finish(started) == 137
        until(lambda: all(map(has_ended, ranks)))
    assert f"error: rank {lost} was killed by SIGKILL" in started.stderr
    resumed = forks.start("resume", "run", "epochs=2", cwd=tmp_path)
    assert finish(resumed) in (0, 2), resumed.stderr  # 2: more epochs are done already
    assert ranks_of_checkpoint(tmp_path / "run") == 2


def test_python_trains_in_its_own_process_and_refuses_several_devices(here: Path) -> None:
    with pytest.raises(ConfigError, match="devices=2: a call from Python trains in this process alone"):
        trainkit.train(trainkit.compose([*TRAINING, "devices=2"]))
    assert not (here / "outputs").exists()


def test_ranks_of_torchrun_take_no_other_number_of_devices(forks: Forks, tmp_path: Path) -> None:
    ended = run_ranks(forks, 2, *TRAINING, "epochs=1", "devices=3", cwd=tmp_path)
    assert ended.codes == [2, 2]
    assert "devices=3: torchrun has started 2 processes" in ended.stderr[0]


@pytest.mark.parametrize(("devices", "code", "text"), [("2", 0, "no errors found"), ("all", 2, "no NVIDIA GPU")])
def test_check_trains_in_one_process_and_knows_the_gpus(
    devices: str, code: int, text: str, forks: Forks, tmp_path: Path
) -> None:
    started = forks.start(
        "check", *TRAINING, f"devices={devices}", "--seconds", "0", cwd=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert finish(started) == code, started.stderr
    assert text in started.stdout + started.stderr

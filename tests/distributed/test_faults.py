"""Real faults of one rank: signals, errors, kills, a frozen process, a full disk. All ranks end, and say why."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.helpers import Ended, run_ranks, start_ranks, torchrun
from tests.helpers import mounted_disk, read_history
from tests.processes import Forks, until
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS

SIXTY = 60.0  # seconds: a fault ends all ranks within them

# Each part of a training calls `strike`, which causes the fault of the test.
MODULE = """
import collections, os, signal, sys, time
import torch
from torch import nn

calls = collections.Counter()

def strike(place):
    calls[place] += 1
    if os.environ.get("FAULT") is None or int(os.environ["FAULT_RANK"]) not in (-1, int(os.environ["RANK"])):
        return
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":  # torchrun has started the ranks again
        return
    if place != os.environ["FAULT_PLACE"] or calls[place] != int(os.environ.get("FAULT_CALL", "2")):
        return
    fault = os.environ["FAULT"]
    if fault == "raise":
        raise ValueError("broken on purpose")
    if fault == "exit":
        os._exit(9)
    if fault == "wait":
        open("waiting", "w").close()
        time.sleep(1000)
    os.kill(os.getpid(), getattr(signal, fault))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        strike("build")
        self.first, self.dropout, self.last = nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 3)

    def forward(self, x):
        strike("forward")
        return self.last(self.dropout(torch.relu(self.first(x))))

class Points:
    classes = ["a", "b", "c"]

    def __init__(self, size=64):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == 33 and self.size > 33:
            strike("data")
        generator = torch.Generator().manual_seed(index)
        return torch.randn(8, generator=generator), index % 3

def step(model, inputs, targets, loss_fn):
    strike("step")
    return loss_fn(model(inputs), targets)

class Metric:
    def reset(self):
        self.count = 0

    def update(self, outputs, targets):
        strike("metric")
        self.count += len(targets)

    def compute(self):
        return float(self.count)

class Hook:
    def on_start(self, state):
        strike("on_start")

    def on_step(self, state):
        time.sleep(0.02)
        strike("on_step")

    def on_val_batch(self, state, inputs, targets, outputs):
        strike("on_val_batch")

    def on_epoch_end(self, state, metrics):
        strike("on_epoch_end")

    def on_end(self, state):
        strike("on_end")
"""
DATA = """
train: {_target_: faultmodule.Points}
val: {_target_: faultmodule.Points, size: 16}
"""
BASE = [
    *("model._target_=faultmodule.Net", "data=points", "data.cache=off", "batch_size=8", "epochs=3"),
    *("+hooks.fault._target_=faultmodule.Hook", "checkpoint.every_steps=4", "progress=off", "hydra.run.dir=run"),
]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a model, data and a hook whose faults a test chooses."""
    (tmp_path / "faultmodule.py").write_text(MODULE)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "points.yaml").write_text(DATA)
    return tmp_path


def fault(place: str, kind: str, *, rank: int = 1, call: int = 2) -> dict[str, Any]:
    """Return the variables that cause a fault when a rank calls a place for the n-th time; rank -1 means all ranks."""
    return {"FAULT": kind, "FAULT_PLACE": place, "FAULT_RANK": str(rank), "FAULT_CALL": str(call)}


def info_of(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`."""
    info: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    return info


def check_messages(ended: Ended, *words: str, printing: int = 0) -> None:
    """Check that one rank prints one message, and that it has these words."""
    for rank, text in enumerate(ended.stderr):
        assert "Traceback" not in text, text
        if rank == printing:
            assert text.count("error: ") + text.count("stopped by") == 1, text
            assert all(word in text for word in words), text
        else:
            assert "error" not in text, text
            assert "stopped" not in text, text


def check_failed(ended: Ended, folder: Path, code: int, *words: str) -> None:
    """Check that all ranks ended with this code, and that rank 0 and `run.json` say why."""
    assert ended.codes == [code] * len(ended.codes), ended
    check_messages(ended, *words)
    info = info_of(folder)
    assert (info["status"], info["exit_code"]) == ("failed", code)
    assert all(word in info["why"] for word in words), info["why"]


# ------------------------------------------------------------------------------------------------ signals

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75, "SIGHUP": 129}
SIGNALS = [("SIGTERM", 1), ("SIGINT", 0), ("SIGUSR1", 1)]


@pytest.mark.parametrize(
    ("name", "rank"), [pytest.param(*case, marks=[pytest.mark.slow] * (case != SIGNALS[0])) for case in SIGNALS]
)
def test_a_signal_to_one_rank_saves_and_stops_all_ranks(forks: Forks, own: Path, name: str, rank: int) -> None:
    ended = run_ranks(forks, 2, *BASE, cwd=own, **fault("on_step", name, rank=rank, call=5))
    assert ended.codes == [CODES[name]] * 2, ended
    check_messages(ended, f"stopped by {name}, saved as step-00000005; to continue: trainkit resume run")
    info = info_of(own)
    assert (info["status"], info["exit_code"], info["why"]) == ("stopped", CODES[name], name)
    assert Checkpoints(own / "run" / "checkpoints").newest()[0] == "step-00000005"


@pytest.mark.slow
@pytest.mark.parametrize(("place", "step"), [("on_start", 0), ("on_val_batch", 8), ("forward", None), ("data", None)])
def test_a_signal_at_any_time_stops_all_ranks_at_the_same_step(
    forks: Forks, own: Path, place: str, step: int | None
) -> None:
    call = 1 if place in ("on_start", "data") else 2
    ended = run_ranks(forks, 2, *BASE, cwd=own, **fault(place, "SIGTERM", call=call))
    assert ended.codes == [143, 143], ended
    check_messages(ended, "stopped by SIGTERM, saved as step-")
    assert info_of(own)["status"] == "stopped"
    name, saved, _ = Checkpoints(own / "run" / "checkpoints").newest()
    assert step is None or saved["step"] == step, name


@pytest.mark.slow
def test_a_signal_while_a_rank_builds_its_objects_stops_all_ranks(forks: Forks, own: Path) -> None:
    ended = run_ranks(forks, 2, *BASE, cwd=own, **fault("build", "SIGTERM", call=1))
    assert ended.codes == [143, 143], ended
    check_messages(ended, "stopped by SIGTERM")


@pytest.mark.slow
def test_ranks_that_get_different_signals_end_with_the_same_exit_code(forks: Forks, own: Path) -> None:
    running = start_ranks(forks, 2, *BASE, "epochs=1000", cwd=own)
    until(lambda: (own / "run" / "history.jsonl").exists() and (own / "run" / "history.jsonl").read_text())
    for process, number in zip(running.processes, (signal.SIGTERM, signal.SIGINT), strict=True):
        process.send(number)
    ended = running.wait()
    assert len(set(ended.codes)) == 1, ended
    assert ended.codes[0] in (143, 130)
    check_messages(ended, "stopped by", "to continue")


# ------------------------------------------------------------------------------------------------- errors

# The place of the error, the config key in the message, further overrides, the exit code.
ERRORS: dict[str, tuple[str, Sequence[str], int]] = {
    "on_step": ("hooks.fault", [], 1),
    "data": ("data.train", [], 1),
    "forward": ("model", [], 1),
    "step": ("training_step", ["training_step=faultmodule.step"], 1),
    "metric": ("metrics.seen", ["+metrics.seen._target_=faultmodule.Metric"], 1),
    "on_start": ("hooks.fault", [], 2),
    "on_val_batch": ("hooks.fault", [], 1),
    "on_end": ("hooks.fault", [], 1),
}


@pytest.mark.parametrize("place", [pytest.param(p, marks=[pytest.mark.slow] * (p != "on_step")) for p in ERRORS])
def test_an_error_on_one_rank_ends_all_ranks_with_its_cause(forks: Forks, own: Path, place: str) -> None:
    key, more, code = ERRORS[place]
    # The first passes belong to the comparison of a batch with its parts.
    call = 1 if place in ("on_start", "on_end", "data") else 12 if place in ("forward", "step") else 2
    ended = run_ranks(forks, 2, *BASE, *more, cwd=own, timeout=SIXTY, **fault(place, "raise", call=call))
    check_failed(ended, own, code, f"rank 1: {key}", "ValueError: broken on purpose")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["on_step", "forward"])
def test_an_error_that_all_ranks_have_is_printed_once(forks: Forks, own: Path, place: str) -> None:
    ended = run_ranks(forks, 2, *BASE, cwd=own, timeout=SIXTY, **fault(place, "raise", rank=-1, call=12))
    check_failed(ended, own, 1, "ValueError: broken on purpose")


@pytest.mark.slow
def test_an_error_while_a_rank_builds_its_objects_ends_all_ranks(forks: Forks, own: Path) -> None:
    ended = run_ranks(forks, 2, *BASE, cwd=own, timeout=SIXTY, **fault("build", "raise", call=1))
    assert ended.codes == [2, 2], ended
    check_messages(ended, "rank 1: model: ValueError: broken on purpose")


@pytest.mark.slow
def test_a_config_error_is_printed_once(forks: Forks, own: Path) -> None:
    ended = run_ranks(forks, 2, *BASE, "learning_rate=1", cwd=own, timeout=SIXTY)
    assert ended.codes == [2, 2], ended
    check_messages(ended, "learning_rate")


# -------------------------------------------------------------------------------------------- lost ranks

LOST = [("exit", 1), ("SIGKILL", 2), ("SIGSEGV", 0)]


@pytest.mark.parametrize(
    ("kind", "rank"), [pytest.param(*case, marks=[pytest.mark.slow] * (case != LOST[0])) for case in LOST]
)
def test_a_process_that_dies_ends_the_other_ranks(forks: Forks, own: Path, kind: str, rank: int) -> None:
    size = 2 if kind == "exit" else 3
    ended = run_ranks(forks, size, *BASE, cwd=own, timeout=SIXTY, **fault("on_step", kind, rank=rank, call=5))
    died = ended.codes.pop(rank)
    assert died == 9 if kind == "exit" else died == -getattr(signal, kind)
    assert set(ended.codes) == {1}, ended
    text = f"error: rank {rank}: lost, because its process has ended"
    for other in set(range(size)) - {rank}:
        assert (text in ended.stderr[other]) == (other == 0 or rank == 0), ended.stderr
    if rank:
        assert info_of(own)["why"] == text.removeprefix("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [1])
def test_a_frozen_process_ends_the_other_ranks_within_60_seconds(forks: Forks, own: Path, frozen: int) -> None:
    running = start_ranks(forks, 2, *BASE, cwd=own, **fault("on_step", "SIGSTOP", rank=frozen, call=5))
    until(lambda: has_stopped(running.processes[frozen].pid), timeout=120)
    started, other = time.monotonic(), running.processes[1 - frozen]
    code = until(lambda: other.wait() + 1, timeout=SIXTY) - 1
    seconds = time.monotonic() - started
    running.processes[frozen].send(signal.SIGCONT)  # it finds out that it was given up
    ended = running.wait()
    assert code == 1
    assert seconds < SIXTY
    assert ended.codes == [1, 1], ended
    text = f"error: rank {frozen}: lost, because it gave no sign of life for 30 s"
    assert text in ended.stderr[1 - frozen]
    if frozen:
        assert (info_of(own)["status"], info_of(own)["why"]) == ("failed", text.removeprefix("error: "))


def has_stopped(pid: int) -> bool:
    """Return whether a process is stopped, as by SIGSTOP."""
    return re.search(r"^State:\s+T", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_a_process_that_dies_ends_ranks_that_torch_connects_in_the_passes(
    forks: Forks, own: Path, distributed: str
) -> None:
    argv = [*BASE, f"distributed={distributed}"]
    ended = run_ranks(forks, 2, *argv, cwd=own, timeout=SIXTY, **fault("forward", "SIGKILL", call=9))
    assert ended.codes == [1, -9], ended
    assert info_of(own)["why"] == "rank 1: lost, because its process has ended"


@pytest.mark.slow
def test_an_error_on_one_rank_ends_ranks_with_shards(forks: Forks, own: Path) -> None:
    argv = [*BASE, "distributed=fsdp"]
    ended = run_ranks(forks, 2, *argv, cwd=own, timeout=SIXTY, **fault("forward", "raise", call=9))
    check_failed(ended, own, 1, "rank 1: model: ValueError: broken on purpose")


# ------------------------------------------------------------------------------------------ the full disk


@pytest.fixture
def small_disk(own: Path) -> Iterator[Path]:
    """Mount a disk of 1 MiB at `run`."""
    with mounted_disk(own / "disk", "1m") as disk:
        yield disk


@pytest.mark.slow
def test_a_full_disk_of_rank_0_ends_all_ranks(forks: Forks, own: Path, small_disk: Path) -> None:
    argv = [*BASE, "hydra.run.dir=disk/run", "checkpoint.keep=1000", "epochs=1000"]
    ended = run_ranks(forks, 3, *argv, cwd=own)
    assert ended.codes == [6, 6, 6], ended
    check_messages(ended, "cannot be written: No space left on device", "trainkit resume disk/run")
    info = json.loads((small_disk / "run" / "run.json").read_text())
    assert (info["status"], info["exit_code"]) == ("failed", 6)


# ----------------------------------------------------------------------------------------------- restarts

# Faults of the first start only: place, kind, rank, call, and the checkpoint from which the second start continues.
RESTARTS = {
    "a killed rank": ("on_step", "SIGKILL", 1, 7, "step-00000004"),
    "before the first checkpoint": ("on_start", "exit", 0, 1, None),
    "in the validation": ("on_val_batch", "exit", 1, 2, "step-00000004"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESTARTS)
def test_ranks_that_torchrun_starts_again_continue_to_the_same_result(own: Path, forks: Forks, name: str) -> None:
    place, kind, rank, call, checkpoint = RESTARTS[name]
    variables = fault(place, kind, rank=rank, call=call)
    ended = torchrun(2, *BASE, cwd=own, restarts=2, **variables)
    assert ended.codes == [0], ended.stderr[0]
    assert [path.name for path in own.iterdir() if (path / "run.json").exists()] == ["run"]
    info = info_of(own)
    assert info["status"] == "completed"
    assert [entry["checkpoint"] for entry in info["resumed"]] == [checkpoint]
    run_ranks(forks, 2, *BASE, "hydra.run.dir=straight", cwd=own)
    assert final(own / "run") == final(own / "straight")


@pytest.mark.slow
def test_a_resume_that_torchrun_starts_again_continues_to_the_same_result(own: Path, forks: Forks) -> None:
    stopped = run_ranks(forks, 2, *BASE, cwd=own, **fault("on_step", "SIGTERM", call=5))
    assert stopped.codes == [143, 143], stopped
    variables = fault("on_step", "SIGKILL", call=8)
    ended = torchrun(2, "resume", "run", "progress=off", cwd=own, restarts=2, **variables)
    assert ended.codes == [0], ended.stderr[0]
    assert [entry["checkpoint"] for entry in info_of(own)["resumed"]] == ["step-00000005", "step-00000012"]
    run_ranks(forks, 2, *BASE, "hydra.run.dir=straight", cwd=own)
    assert final(own / "run") == final(own / "straight")


def final(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the hash of the final state of a run, and its history without times."""
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_history(run)]
    return digest(Checkpoints(run / "checkpoints").newest()[1]), history

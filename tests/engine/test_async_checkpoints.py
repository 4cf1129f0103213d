"""`checkpoint.async`: a thread writes a copy of the state while the training goes on; by default, if it is large."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import trainkit
from tests.conftest import Command
from tests.engine.test_length import final
from tests.helpers import SmallCNN, read_history, small_run
from tests.processes import Forks
from trainkit.core.errors import StorageError
from trainkit.core.pytree import copy_to_cpu
from trainkit.runs import checkpoint, saver
from trainkit.runs.checkpoint import Checkpoints, checkpoint_name
from trainkit.runs.snapshot import capture_state, digest

slow = pytest.mark.slow
ASYNC = "checkpoint.async=on"
RUN = ["limit_batches=6", "epochs=3", "progress=off", "optim=adamw", "ema=0.9", "checkpoint.every_steps=2"]
writing: Any = checkpoint  # the module, whose names the tests replace


def train(directory: Path, *more: str, hooks: list[Any] | None = None) -> Any:
    return trainkit.train(trainkit.compose(small_run(SmallCNN, *more)), directory=directory, hooks=hooks or [])


def files(run: Path) -> tuple[list[str], str, str]:
    """Return the names of the checkpoints of a run, and its pointers."""
    found = run / "checkpoints"
    return Checkpoints(found).names(), (found / "last").read_text(), (found / "best").read_text()


def test_a_run_has_the_checkpoints_pointers_and_history_of_a_run_without_it(tmp_path: Path) -> None:
    more = ["epochs=3", "limit_batches=4", "checkpoint.every_steps=1", "checkpoint.keep=3"]
    for name, value in (("off", "off"), ("on", "on")):
        train(tmp_path / name, *more, f"checkpoint.async={value}")
    assert files(tmp_path / "on") == files(tmp_path / "off")
    assert final(tmp_path / "on") == final(tmp_path / "off")


@pytest.mark.parametrize(
    ("large", "free", "thread"),
    [(1, 2**40, "trainkit-background"), (2**40, 2**60, "MainThread"), (1, 2, "MainThread")],
    ids=["large", "small", "no memory for a copy"],
)
def test_by_default_a_thread_writes_a_large_state_if_a_copy_fits_into_the_memory(
    large: int, free: int, thread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, write = set[str](), writing.write_checkpoint_files

    def noted(*args: Any) -> None:
        threads.add(threading.current_thread().name)
        write(*args)

    monkeypatch.setattr(checkpoint, "write_checkpoint_files", noted)
    monkeypatch.setattr(saver, "LARGE", large)
    monkeypatch.setattr(saver, "free_host_memory", lambda: free)
    train(tmp_path / "run", "epochs=2", "limit_batches=2")
    assert threads == {thread}


class Held:
    """A hook that lets the thread write step 3 only after step 5, and keeps the state of step 3."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write, self.state, self.threads = threading.Event(), "", set[str]()
        write = writing.write_checkpoint_files

        def wait_and_write(folder: Path, saved: Mapping[str, Any], *more: Any) -> None:
            self.threads.add(threading.current_thread().name)
            if saved["step"] == 3:
                assert self.may_write.wait(60)
            write(folder, saved, *more)

        monkeypatch.setattr(checkpoint, "write_checkpoint_files", wait_and_write)

    def on_step(self, state: Any) -> None:
        if state.step == 3:
            self.state = digest(copy_to_cpu(capture_state(state, {})))
        if state.step == 5:
            assert not Checkpoints(state.directory / "checkpoints").is_valid(checkpoint_name(3))
            self.may_write.set()


def test_a_checkpoint_holds_one_step_although_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    more = ["epochs=1", "limit_batches=6", "checkpoint.every_steps=3", "optim=adamw", "ema=0.9", "checkpoint.keep=9"]
    train(tmp_path / "run", *more, ASYNC, hooks=[held])
    assert digest(Checkpoints(tmp_path / "run" / "checkpoints").load(checkpoint_name(3))) == held.state
    assert held.threads == {"trainkit-background"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let the disk be full from the checkpoint of a step on."""
    full, write = {"step": 0}, writing.write_checkpoint_files

    def fill(folder: Path, saved: Mapping[str, Any], *more: Any) -> None:
        if saved["step"] >= full["step"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, saved, *more)

    monkeypatch.setattr(checkpoint, "write_checkpoint_files", fill)
    return full


class Steps:
    """A hook, called after the saver, that counts the steps and lets the thread end."""

    def __init__(self) -> None:
        self.step = 0

    def on_step(self, state: Any) -> None:
        self.step = state.step
        for thread in threading.enumerate():
            if thread.name == "trainkit-background":
                thread.join()


@pytest.mark.parametrize(("step", "last_step"), [(2, 2), (8, 8)])
def test_a_full_disk_ends_the_run_at_the_next_step_or_at_the_end(
    step: int, last_step: int, tmp_path: Path, full_disk: dict[str, int]
) -> None:
    full_disk["step"], hook = step, Steps()
    with pytest.raises(StorageError, match="No space left on device") as caught:
        train(tmp_path / "run", "epochs=2", "limit_batches=4", "checkpoint.every_steps=2", ASYNC, hooks=[hook])
    assert caught.value.exit_code == 6
    assert hook.step == last_step
    info = (tmp_path / "run" / "run.json").read_text()
    assert '"status": "failed"' in info
    assert '"exit_code": 6' in info


def test_a_signal_waits_for_the_checkpoint(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "stopping.py").write_text(
        "import os, signal\nclass Stop:\n    def on_step(self, state):\n"
        "        if state.step == 5:\n            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    hook = "+hooks.stop._target_=stopping.Stop"
    stopped = forks.start(*RUN, ASYNC, hook, "checkpoint.every_steps=5", "hydra.run.dir=run", cwd=tmp_path)
    assert stopped.wait() == 143, stopped.stderr
    assert "saved as step-00000005" in stopped.stderr
    assert Checkpoints(tmp_path / "run" / "checkpoints").is_valid("step-00000005")


def test_a_rollback_waits_for_the_checkpoint(tmp_path: Path) -> None:
    class Bad:
        """A hook that makes the gradient of two batches infinite."""

        def on_start(self, state: Any) -> None:
            param = next(state.model.parameters())
            param.register_hook(lambda grad: grad * (float("inf") if state.batch in (2, 4) else 1))

    more = ["epochs=2", "limit_batches=6", "checkpoint.every_steps=1", "on_nonfinite=rollback"]
    for value in ("off", "on"):
        train(tmp_path / value, *more, f"checkpoint.async={value}", hooks=[Bad()])
    assert final(tmp_path / "on") == final(tmp_path / "off")
    assert sum(row["train/skipped"] for row in read_history(tmp_path / "on")) == 4


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(1000, 100)
    copies = copy_to_cpu({"one": weight, "two": weight.detach(), "other": weight[:10]}, shared={})
    assert copies["one"].data_ptr() == copies["two"].data_ptr() != weight.data_ptr()
    assert copies["other"].data_ptr() != copies["one"].data_ptr()
    torch.save(copies, tmp_path / "tied.pt")
    assert (tmp_path / "tied.pt").stat().st_size < 1.2 * weight.nbytes


@pytest.mark.parametrize(
    ("moment", "count"),
    [("writing", 4), *(pytest.param(*case, marks=slow) for case in [("pointer", 4), ("step", 9), ("writing", 2)])],
)
def test_a_killed_run_resumes_to_the_same_bits(
    moment: str, count: int, forked: Command, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "killmodule.py").write_text(
        (Path(__file__).parents[1] / "distributed" / "killmodule.py").read_text(encoding="utf-8")
    )
    assert forked(*RUN, "hydra.run.dir=straight").returncode == 0
    hook = f"+hooks.kill={{_target_: killmodule.Kill, moment: {moment}, count: {count}}}"
    process = forks.start(*RUN, ASYNC, hook, "hydra.run.dir=resumed", cwd=tmp_path)
    assert process.wait() == -signal.SIGKILL, process.stderr
    done = forked("resume", "resumed", "~hooks.kill")
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "resumed") == final(tmp_path / "straight")

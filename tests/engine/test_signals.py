"""Signals at any moment: the exit code is that of the first signal, and no traceback appears."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SCRIPT
from tests.processes import Forks, until
from trainkit.runs.checkpoint import Checkpoints

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 75}
MODULE = """
import time
from multiprocessing import Pool
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self, wait=0.0):
        super().__init__()
        self.layer, self.wait = nn.Linear(4, 2), wait

    def forward(self, x):
        if self.wait:
            Path("in a step").touch()
            sum(range(int(5e7 * self.wait)))  # in C: Python handles signals only afterwards
        return self.layer(x)

class SlowlySaved(Net):
    def state_dict(self, *args, **kwargs):
        if Path("save slowly").exists():
            Path("saving").touch()
            time.sleep(0.5)
        return super().state_dict(*args, **kwargs)

class Exit:
    '''Exit handlers that take a while.'''
    def on_start(self, state):
        import atexit
        atexit.register(self.leave)
    def leave(self):
        Path("leaving").touch()
        for _ in range(100):
            time.sleep(0.005)

def points(pool=False):
    if pool:
        with Pool(2) as made:
            made.map(abs, range(4))
    return TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))
"""
ARGV = ["model=net", "data=points", "batch_size=4", "progress=off", "hydra.run.dir=run", "epochs=99"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a model whose steps, saves and exit may be slow."""
    (tmp_path / "stopmodule.py").write_text(MODULE)
    for name, text in (
        ("model/net", "_target_: stopmodule.Net\n"),
        ("data/points", "train: {_target_: stopmodule.points}\nclasses: 2\nsplit: off\n"),
    ):
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    return tmp_path


def start(own: Path, *argv: str) -> subprocess.Popen[str]:
    """Start the installed command, whose exit includes that of Python."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [SCRIPT, *argv], cwd=own, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def has_no_traceback(text: str) -> bool:
    """Return whether stderr contains neither a traceback nor an ignored exception."""
    return not any(word in text for word in ("Traceback", "Exception ignored", "Error in"))


def is_delivered(pid: int) -> bool:
    """Return whether a process has no pending signal. The kernel delivers pending signals by their number."""
    status = Path(f"/proc/{pid}/status").read_text()
    return all(int(pending, 16) == 0 for pending in re.findall(r"(?:Sig|Shd)Pnd:\s*([0-9a-f]+)", status))


def test_the_same_signal_twice_within_a_second_keeps_the_exit_code(own: Path) -> None:
    run = start(own, *ARGV, "+model.wait=0.1")
    until((own / "in a step").exists)
    for _ in range(2):
        run.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
    _, text = run.communicate(timeout=60)
    assert run.returncode == 75, text
    assert text.startswith("stopped by SIGUSR1, saved as step-")
    assert has_no_traceback(text)


def test_a_burst_of_signals_until_the_process_has_exited_keeps_the_first_exit_code(own: Path) -> None:
    run = start(own, *ARGV, "+model.wait=0.05", "+hooks.exit._target_=stopmodule.Exit")
    until((own / "in a step").exists)
    run.send_signal(signal.SIGUSR1)
    until(lambda: is_delivered(run.pid))
    began = time.monotonic()
    for number in itertools.cycle(CODES):
        if run.poll() is not None or time.monotonic() - began > 0.95:
            break
        run.send_signal(number)
        time.sleep(0.01)
    _, text = run.communicate(timeout=60)
    assert run.returncode == 75, text
    assert text.startswith("stopped by SIGUSR1, saved as step-")
    assert has_no_traceback(text)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CODES, 2)))
def test_the_signal_that_arrives_first_sets_the_exit_code(
    first: signal.Signals, second: signal.Signals, own: Path, forks: Forks
) -> None:
    """Both signals arrive within one operation, after which Python handles them in the order of their numbers."""
    run = forks.start(*ARGV, "+model.wait=0.2", cwd=own)
    until((own / "in a step").exists)
    time.sleep(0.01)
    run.send(first)
    until(lambda: is_delivered(run.pid))
    run.send(second)
    assert run.wait() == CODES[first], run.stderr
    assert f"stopped by {first.name}, saved as step-" in run.stderr
    assert has_no_traceback(run.stderr)


@pytest.mark.parametrize("number", CODES)
def test_signals_while_a_stopped_run_saves_change_nothing(number: signal.Signals, own: Path, forks: Forks) -> None:
    argv = ["model._target_=stopmodule.SlowlySaved", "+model.wait=0.05", "checkpoint.every_epochs=99"]
    run = forks.start(*ARGV, *argv, cwd=own)
    until((own / "in a step").exists)
    (own / "save slowly").touch()
    run.send(signal.SIGUSR1)
    until((own / "saving").exists)
    for _ in range(3):
        run.send(number)
        time.sleep(0.05)
    assert run.wait() == 75, run.stderr
    assert has_no_traceback(run.stderr)
    assert Checkpoints(own / "run" / "checkpoints").newest()[1]["step"] >= 1


def test_a_first_signal_while_the_process_exits_leaves_the_exit_code_of_the_finished_training(own: Path) -> None:
    run = start(own, *ARGV, "epochs=1", "+hooks.exit._target_=stopmodule.Exit")
    until((own / "leaving").exists)
    while run.poll() is None:
        run.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        if (own / "leaving").stat().st_mtime + 0.9 < time.time():
            break
    _, text = run.communicate(timeout=60)
    assert run.returncode == 0, text
    assert has_no_traceback(text)


def wait_for_handler(pid: int, number: signal.Signals) -> None:
    """Wait until a process handles a signal itself."""
    status = Path(f"/proc/{pid}/status")
    deadline = time.monotonic() + 30
    while status.exists() and time.monotonic() < deadline:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_the_start_sets_the_exit_code(number: signal.Signals, own: Path) -> None:
    for wait in (0.1, 0.5, 1.2):
        run = start(own, *ARGV, f"hydra.run.dir=run-{wait}", "+model.wait=9", "+hooks.exit._target_=stopmodule.Exit")
        wait_for_handler(run.pid, signal.SIGTERM)  # the signals before it end the interpreter
        time.sleep(wait)
        run.send_signal(number)
        time.sleep(0.02)
        run.send_signal(number)
        _, text = run.communicate(timeout=60)
        assert run.returncode == CODES[number], text
        assert has_no_traceback(text)


@pytest.mark.slow
def test_two_signals_at_random_moments_give_the_exit_code_of_the_first(own: Path) -> None:
    for number in range(12):
        first, second = random.choices(list(CODES), k=2)
        run = start(own, *ARGV, f"hydra.run.dir=run{number}", "epochs=99999", "+hooks.exit._target_=stopmodule.Exit")
        wait_for_handler(run.pid, signal.SIGTERM)  # the signals before it end the interpreter
        time.sleep(random.uniform(0, 4))
        run.send_signal(first)
        time.sleep(random.uniform(0, 0.9))
        run.send_signal(second)
        _, text = run.communicate(timeout=60)
        assert run.returncode == CODES[first], text
        assert has_no_traceback(text)


def test_processes_of_a_data_set_can_be_terminated(own: Path, forks: Forks) -> None:
    run = forks.start(*ARGV, "epochs=1", "+data.train.pool=true", cwd=own)
    assert run.wait() == 0, run.stderr
    assert run.stderr.strip() == ""


def test_a_destructor_that_a_signal_interrupts_prints_no_traceback(own: Path) -> None:
    code = (
        "import os, signal, sys\nfrom trainkit.cli import main as cli\nclass Interrupted:\n"
        "    def __del__(self):\n        os.kill(os.getpid(), signal.SIGUSR1)\n        sum(range(9))\n"
        "def dispatch(argv):\n    Interrupted()\n    return 0\n"
        "cli.dispatch = dispatch\nsys.exit(cli.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=own, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "stopped by SIGUSR1\n")

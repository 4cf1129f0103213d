"""What a checkpoint costs beyond torch.save, and whether resuming late in an epoch takes longer than early.

    python benchmarks/checkpoint.py

Both are measured interleaved in one run, and the medians compared.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import capture_state
from trainkit.training.state import LoopSettings, new_state

MODULE = """
import os, time
import torch

class Points:
    classes = ["a", "b"]

    def __len__(self):
        return 2000

    def __getitem__(self, index):
        time.sleep(0.002)  # a file is read and decoded
        return torch.zeros(3, 32, 32, dtype=torch.uint8), index % 2

class Leave:
    def on_step(self, state):
        os._exit(0)
"""
RUN = ["model=mlp", "data=points", "epochs=2", "batch_size=10", "progress=off", "checkpoint.every_steps=1"]


def saving(folder: Path, repeats: int = 15) -> tuple[float, float, float]:
    """MiB of a state, and the median seconds of torch.save and of a whole checkpoint."""
    model = nn.Linear(3400, 3470)  # 45 MiB
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "default"}], lr=0.1)
    state = new_state(model, nn.MSELoss(), optimizer, torch.device("cpu"), LoopSettings(epochs=1))
    checkpoints = Checkpoints(folder / "checkpoints")
    alone, whole = [], []
    for step in range(1, repeats + 1):
        state.progress.step = step
        began = time.perf_counter()
        torch.save(capture_state(state, {}), folder / "alone.pt")
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoints.write(capture_state(state, {}))
        checkpoints.prune(2)
        whole.append(time.perf_counter() - began)
    size = (folder / "alone.pt").stat().st_size / 2**20
    return size, statistics.median(alone), statistics.median(whole)


def resuming(folder: Path, repeats: int = 7) -> tuple[float, float]:
    """Median seconds from the command to the first step, at the start of an epoch and at 90 % of it."""
    (folder / "benchmodule.py").write_text(MODULE)
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "points.yaml").write_text("train: {_target_: benchmodule.Points}\n")
    for name, step in (("start", 1), ("late", 181)):
        kill = f"+hooks.leave={{_target_: trainkit.diagnostics.verify_resume.Kill, step: {step}}}"
        _trainkit(folder, *RUN, kill, f"hydra.run.dir={name}")
    times: dict[str, list[float]] = {"start": [], "late": []}
    for _ in range(repeats):
        for name, seconds in times.items():
            shutil.rmtree(folder / "again", ignore_errors=True)
            shutil.copytree(folder / name, folder / "again")
            began = time.perf_counter()
            _trainkit(folder, "resume", "again", "hooks.leave._target_=benchmodule.Leave", "~hooks.leave.step")
            seconds.append(time.perf_counter() - began)
    return statistics.median(times["start"]), statistics.median(times["late"])


def _trainkit(folder: Path, *argv: str) -> None:
    done = subprocess.run([sys.executable, "-m", "trainkit", *argv], cwd=folder, capture_output=True, check=False)
    assert done.returncode in (0, -9), done.stderr.decode()


def main() -> None:
    """Print both."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        size, alone, whole = saving(folder)
        print(f"saving {size:.0f} MiB: torch.save {alone:.3f} s, a checkpoint {whole:.3f} s: {whole - alone:+.3f} s")
        start, late = resuming(folder)
        print(f"resuming to the first step: at the start {start:.2f} s, at 90 % {late:.2f} s: {late / start:.2f} times")


if __name__ == "__main__":
    main()

"""Compare a checkpoint with torch.save, and a resume late in an epoch with a resume at its start.

    python -m benchmarks.checkpoint

Both sides of a comparison are measured in turns, and the medians are compared.
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
        time.sleep(0.002)  # as if a file were read and decoded
        return torch.zeros(3, 32, 32, dtype=torch.uint8), index % 2

class Exit:
    def on_step(self, state):
        os._exit(0)
"""
RUN = ["model=mlp", "data=points", "epochs=2", "batch_size=10", "progress=off", "checkpoint.every_steps=1"]


def time_saving(folder: Path, repeats: int = 15) -> tuple[float, float, float]:
    """Return the MiB of a state, and the median seconds of torch.save and of a checkpoint."""
    model = nn.Linear(3400, 3470)  # 45 MiB
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "default"}], lr=0.1)
    state = new_state(model, nn.MSELoss(), optimizer, torch.device("cpu"), LoopSettings(epochs=1))
    checkpoints = Checkpoints(folder / "checkpoints")
    torch_save, checkpoint = [], []
    for step in range(1, repeats + 1):
        state.progress.step = step
        began = time.perf_counter()
        torch.save(capture_state(state, {}), folder / "state.pt")
        torch_save.append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoints.write(capture_state(state, {}))
        checkpoints.prune(2)
        checkpoint.append(time.perf_counter() - began)
    size = (folder / "state.pt").stat().st_size / 2**20
    return size, statistics.median(torch_save), statistics.median(checkpoint)


def time_resuming(folder: Path, repeats: int = 7) -> tuple[float, float]:
    """Return the median seconds from the command to the first step, resuming at the start and at 90 % of an epoch."""
    (folder / "benchmodule.py").write_text(MODULE)
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "points.yaml").write_text("train: {_target_: benchmodule.Points}\n")
    for name, step in (("start", 1), ("late", 181)):
        kill = f"+hooks.exit={{_target_: trainkit.diagnostics.verify_resume.Kill, step: {step}}}"
        _trainkit(folder, *RUN, kill, f"hydra.run.dir={name}")
    times: dict[str, list[float]] = {"start": [], "late": []}
    for _ in range(repeats):
        for name, seconds in times.items():
            shutil.rmtree(folder / "copy", ignore_errors=True)
            shutil.copytree(folder / name, folder / "copy")
            began = time.perf_counter()
            _trainkit(folder, "resume", "copy", "hooks.exit._target_=benchmodule.Exit", "~hooks.exit.step")
            seconds.append(time.perf_counter() - began)
    return statistics.median(times["start"]), statistics.median(times["late"])


def _trainkit(folder: Path, *argv: str) -> None:
    done = subprocess.run([sys.executable, "-m", "trainkit", *argv], cwd=folder, capture_output=True, check=False)
    assert done.returncode in (0, -9), done.stderr.decode()


def main() -> None:
    """Run both comparisons and print the medians."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        size, torch_save, checkpoint = time_saving(folder)
        print(f"saving {size:.0f} MiB: torch.save {torch_save:.3f} s, checkpoint {checkpoint:.3f} s")
        start, late = time_resuming(folder)
        print(f"resuming to the first step: at the start {start:.2f} s, at 90 % {late:.2f} s: {late / start:.2f} times")


if __name__ == "__main__":
    main()

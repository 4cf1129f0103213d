"""Compare the estimates of `trainkit check` with the runs: time, peak memory, and size of a checkpoint.

    OMP_NUM_THREADS=1 python -m benchmarks.check
    OMP_NUM_THREADS=1 python -m benchmarks.check --configs digits --rounds 1

The peak memory of a run is that at the end of its training: at its exit, a process reads more of torch's libraries.
A round is a check, the run, and another check, so that all see a similar load of the machine. The two estimates are
averaged. A ratio is estimate / run, and the table has the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.interleave import describe_machine, markdown_table
from trainkit.core.device import peak_memory
from trainkit.training.state import State

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("trainkit")
CONFIGS = {
    "digits": [],
    "resnet": ["model=torchvision", "model.name=resnet18", "data=image_folder", "data.root=images", "data.size=64"],
    "char_gpt": ["experiment=char_gpt", "steps=300"],
    "table": ["experiment=table_regression", "epochs=400"],
}
MORE = {"resnet": ["epochs=2", "optim=adamw", "data.num_workers=0"]}


@dataclass
class Outcome:
    """What a run took, or an estimate of it."""

    seconds: float
    memory: float  # bytes
    checkpoint: float  # bytes


class Peak:
    """A hook that writes the peak memory of a training into its directory."""

    def on_end(self, state: State) -> None:
        """Write the bytes."""
        assert state.directory is not None
        (state.directory / "peak").write_text(str(peak_memory(state.device)))


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=["digits", "resnet", "char_gpt"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=800, help="of the folder of images")
    parser.add_argument("overrides", nargs="*", help="for all configs, after --")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRAINKIT_CACHE"] = str(Path(folder) / "cache")
        if "resnet" in args.configs:
            write_images(Path(folder) / "images", args.images)
        for name in args.configs:
            overrides = [*CONFIGS[name], *MORE.get(name, []), *args.overrides]
            rounds = [measure(overrides, Path(folder), f"{name}-{number}") for number in range(args.rounds)]
            runs, ratios = [run for run, _ in rounds], [ratio for _, ratio in rounds]
            cells = [name, f"{statistics.median(run.seconds for run in runs):.1f} s"]
            cells += [f"{statistics.median(ratio.seconds for ratio in ratios):.2f}"]
            cells += [f"{statistics.median(run.memory for run in runs) / 2**20:,.0f} MiB"]
            cells += [f"{statistics.median(ratio.memory for ratio in ratios):.2f}"]
            rows.append([*cells, f"{statistics.median(ratio.checkpoint for ratio in ratios):.2f}"])
            print(f"{name}: ratios of the time {', '.join(f'{r.seconds:.2f}' for r in ratios)}", file=sys.stderr)
    print(f"{describe_machine()}\n")
    head = ["config", "run", "time, ratio", "peak memory", "memory, ratio", "checkpoint, ratio"]
    print(markdown_table(head, rows))


def measure(overrides: list[str], folder: Path, name: str) -> tuple[Outcome, Outcome]:
    """Check, run and check again; return the run, and the ratios of the mean estimate to it."""
    first = estimate(overrides, folder)
    run = train(overrides, folder, name)
    second = estimate(overrides, folder)
    mean = {key: (getattr(first, key) + getattr(second, key)) / 2 for key in ("seconds", "memory", "checkpoint")}
    return run, Outcome(**{key: value / getattr(run, key) for key, value in mean.items()})


def estimate(overrides: list[str], folder: Path) -> Outcome:
    """Return the estimates of a check."""
    command = [str(SCRIPT), "check", *overrides, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    estimates = json.loads(done.stdout)["estimates"]
    return Outcome(estimates["run"], estimates["memory"], estimates["checkpoint"])


def train(overrides: list[str], folder: Path, name: str) -> Outcome:
    """Train a config; return what it took."""
    command = [str(SCRIPT), *overrides, f"hydra.run.dir={name}", "+hooks.peak._target_=benchmarks.check.Peak"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    newest = max((folder / name / "checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in newest.iterdir())
    return Outcome(seconds, float((folder / name / "peak").read_text()), size)


def write_images(folder: Path, count: int) -> None:
    """Write a folder of random images of two classes, 96 x 96, as JPEG files: a fifth of them for validation."""
    generator = np.random.default_rng(0)
    for number in range(count):
        part, label = ("val" if number % 5 == 0 else "train"), "ab"[number % 2]
        file = folder / part / label / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(file)


if __name__ == "__main__":
    main()

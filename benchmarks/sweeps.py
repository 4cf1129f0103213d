"""Compare trainkit's launcher with Hydra's basic launcher, which runs the jobs in one process, one after another.

    python -m benchmarks.sweeps --repeats 3

Both launchers run the same sweeps in turns. Besides: what the start of a further job costs, and whether the memory of
the launcher stays flat over many jobs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.interleave import describe_machine, markdown_table
from trainkit.sweeps.resources import resident_memory

SWEEPS = {
    "16 jobs of model=mlp epochs=20": ["model=mlp", "epochs=20", "seed=range(16)"],
    "8 jobs of the default model, epochs=5": ["epochs=5", "seed=range(8)"],
}
TINY = ["model=mlp", "epochs=1", "limit_batches=1", "hydra.launcher.n_jobs=1"]
QUIET = ["progress=off", "report=off"]


def main() -> None:
    """Run the comparison and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=200, help="jobs of the sweep whose memory is measured; 0: none")
    parser.add_argument("--baseline", help="the src folder of another version, whose basic launcher is timed")
    args = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        race(Path(folder), args.repeats, args.baseline)
        measure_start(Path(folder))
        if args.jobs:
            measure_memory(Path(folder), args.jobs)


def race(folder: Path, repeats: int, baseline: str | None) -> None:
    """Time both launchers in turns; print the medians of the ratios."""
    other = [] if baseline else ["hydra/launcher=basic"]
    rows = []
    for name, argv in SWEEPS.items():
        ratios, own = [], []
        for repeat in range(repeats):
            pair = [lambda argv=argv: run(folder, argv), lambda argv=argv: run(folder, [*argv, *other], baseline)]
            order = (0, 1) if repeat % 2 == 0 else (1, 0)
            seconds = [0.0, 0.0]
            for index in order:
                seconds[index] = pair[index]()
            own.append(seconds[0])
            ratios.append(seconds[0] / seconds[1])
            print(f"{name}: {seconds[0]:.1f} s, {seconds[1]:.1f} s by the basic launcher", file=sys.stderr, flush=True)
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        rows.append([name, f"{statistics.median(own):.1f} s", f"{statistics.median(ratios):.2f}", shown])
    print(markdown_table(["sweep", "trainkit's launcher", "ratio to the basic launcher", "each"], rows))


def run(folder: Path, argv: list[str], source: str | None = None) -> float:
    """Run a sweep; return its wall time in seconds."""
    environment = {**os.environ, "PYTHONPATH": source} if source else {**os.environ}
    quiet = QUIET[:1] if source else QUIET
    began = time.perf_counter()
    command = [sys.executable, "-m", "trainkit", "-m", *argv, *quiet]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
    return time.perf_counter() - began


def measure_start(folder: Path) -> None:
    """Print what a further job costs that trains a single batch, with one job at a time."""
    few, many = (run(folder, [*TINY, f"seed=range({jobs})"]) for jobs in (4, 24))
    print(f"\nA further job of one batch, from its start to its end: {(many - few) / 20:.2f} s.")


def measure_memory(folder: Path, jobs: int) -> None:
    """Print the memory of the launcher during the first and the last tenth of a sweep."""
    argv = [sys.executable, "-m", "trainkit", "-m", *TINY[:3], *QUIET, f"seed=range({jobs})", "hydra.sweep.dir=many"]
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sizes: list[tuple[int, int]] = []
    while process.poll() is None:
        time.sleep(0.2)
        ledger = folder / "many" / "sweep.jsonl"
        ended = ledger.read_text().count('"event": "ended"') if ledger.exists() else 0
        sizes.append((ended, resident_memory(process.pid)))
    early = max(size for ended, size in sizes if jobs // 20 <= ended <= jobs // 10)
    late = max(size for ended, size in sizes if ended >= jobs - jobs // 10)
    print(
        f"Memory of the launcher: {early / 2**20:.0f} MiB after {jobs // 10} jobs, {late / 2**20:.0f} MiB at the end."
    )


if __name__ == "__main__":
    main()

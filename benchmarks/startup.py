"""Measure how long a run takes to the end of its first step, compared with importing torch alone.

    python -m benchmarks.startup [--repeats 9]

Whole processes are timed in turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.interleave import describe_machine, markdown_table

HOOK = """
import os

class Exit:
    def on_step(self, state):
        os._exit(0)
"""


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    first_step = ["-m", "trainkit", "+hooks.exit._target_=exithook.Exit"]
    commands = {
        'python -c "import torch"': ["-c", "import torch"],
        "trainkit, to the end of its first step": first_step,
        "trainkit model=mlp optim=adamw, to the end of its first step": [*first_step, "model=mlp", "optim=adamw"],
        "trainkit --cfg job": ["-m", "trainkit", "--cfg", "job"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "exithook.py").write_text(HOOK)
        for repeat in range(repeats + 1):
            for name, argv in commands.items():
                began = perf_counter()
                subprocess.run([sys.executable, *argv], cwd=folder, check=True, capture_output=True)
                if repeat:  # the first repeat only fills the file cache
                    times[name].append(perf_counter() - began)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    reference = next(iter(medians.values()))
    rows = [[name, f"{seconds:.2f}", f"{seconds / reference:.2f}"] for name, seconds in medians.items()]
    print(f"{describe_machine()}; medians of {repeats}\n")
    print(markdown_table(["command", "seconds", "ratio"], rows))


if __name__ == "__main__":
    main()

"""How long a run takes to the end of its first step, against importing torch alone.

    python -m benchmarks.startup [--repeats 9]

Both are whole processes, measured in turn; the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.contest import machine, table

HOOK = """
import os

class Leave:
    def on_step(self, state):
        os._exit(0)
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    leave = ["-m", "trainkit", "+hooks.leave._target_=leavemodule.Leave"]
    commands = {
        'python -c "import torch"': ["-c", "import torch"],
        "trainkit, to the end of its first step": leave,
        "trainkit model=mlp optim=adamw, likewise": [*leave, "model=mlp", "optim=adamw"],
        "trainkit --cfg job": ["-m", "trainkit", "--cfg", "job"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "leavemodule.py").write_text(HOOK)
        for number in range(repeats + 1):  # the first brings the files into memory
            for name, argv in commands.items():
                began = perf_counter()
                subprocess.run([sys.executable, *argv], cwd=folder, check=True, capture_output=True, env=os.environ)
                if number:
                    times[name].append(perf_counter() - began)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = next(iter(medians.values()))
    print(f"{machine()}; medians of {repeats}\n")
    print(table(["command", "seconds", "ratio"], [[n, f"{s:.2f}", f"{s / first:.2f}"] for n, s in medians.items()]))


if __name__ == "__main__":
    main()

"""How long `trainkit compare` takes over many runs.

    python -m benchmarks.comparison [RUNS]

It trains one tiny run, copies its files into 200 run directories with other values, and times the installed command:
5 weight decays x 8 learning rates x 5 seeds. The time includes the start of Python.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 7
EPOCHS = 20
SCRIPT = Path(sys.executable).with_name("trainkit")
FILES = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "run.json", "history.jsonl")


def main() -> None:
    """Make the runs, time the command, and print the times."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder, runs)
        starts, _ = time_command(folder, "--version")
        for words in (["compare", "runs"], ["compare", "runs", "--json"]):
            walls, processors = time_command(folder, *words)
            print(
                f"trainkit {' '.join(words)}: {runs} runs in {statistics.median(walls):.3f} s "
                f"(median of {REPEATS}; {min(walls):.3f} to {max(walls):.3f}), "
                f"processor {statistics.median(processors):.3f} s; "
                f"trainkit --version: {statistics.median(starts):.3f} s"
            )


def make_runs(folder: Path, runs: int) -> None:
    """Train one run, and make copies with other learning rates, weight decays and seeds."""
    small = ["model=mlp", "model.hidden=[4]", f"epochs={EPOCHS}", "limit_batches=1", "progress=off"]
    train = [str(SCRIPT), *small, "hydra.run.dir=first", "lr=0.125", "seed=12345", "optim.weight_decay=0.0625"]
    subprocess.run(train, cwd=folder, check=True, capture_output=True)
    first = {file: (folder / "first" / file).read_text() for file in FILES}
    for number in range(runs):
        values = {"0.125": f"{10 ** -(number // 5 % 8):g}", "0.0625": f"{number // 40}", "12345": f"{number % 5}"}
        for file, text in first.items():
            path = folder / "runs" / str(number) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".yaml"):
                for old, new in values.items():
                    text = text.replace(old, new)
            elif file == "run.json":
                info = json.loads(text)
                info["best"]["val/loss"] = info["best"]["value"] = info["best"]["value"] + number / 1000
                text = json.dumps(info)
            path.write_text(text)
    shutil.rmtree(folder / "first")


def time_command(folder: Path, *words: str) -> tuple[list[float], list[float]]:
    """Return the wall times and the processor times of a command, without its first repetition."""
    walls, processors = [], []
    for _ in range(REPEATS + 1):
        began, used = time.perf_counter(), children_time()
        subprocess.run([SCRIPT, *words], cwd=folder, check=True, capture_output=True)
        walls.append(time.perf_counter() - began)
        processors.append(children_time() - used)
    return walls[1:], processors[1:]


def children_time() -> float:
    """Return the processor time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()

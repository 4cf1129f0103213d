"""Kill sweeps with SIGKILL, all their processes at once, and compare every job with an unbroken sweep.

    python -m benchmarks.sweep_kills --sweeps 20 --seed 0

A killed sweep is resumed until it ends. Each job must end with the same bits as in the unbroken sweep, and the ledger
must hold each job once. The exit code is 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_training import differences_of, final_of
from trainkit.sweeps.ledger import read_ledger

SWEEP = ("-m", "model=mlp", "limit_batches=12", "epochs=6", "checkpoint.every_steps=5", "report=off", "progress=plain")
AXES = ("optim=sgd,adamw", "seed=1,2,3")
JOBS = 6
MAX_KILLS = 3  # of one sweep


def main(document: str | None, unit: str, run: Callable[[Path, int, int], list[str]]) -> int:
    """Parse the command line, kill sweeps and print what is wrong; return the exit code.

    Args:
        document: the text of the module, for the help.
        unit: what is killed: `sweeps` or `searches`.
        run: of the module.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0] if document else None)
    parser.add_argument(f"--{unit}", type=int, default=20, dest="number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(Path(folder), args.number, args.seed)
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def run(folder: Path, sweeps: int, seed: int) -> list[str]:
    """Run the unbroken sweep and the killed ones; return what is wrong.

    Args:
        folder: an empty one.
        sweeps: how many sweeps to kill.
        seed: of the moments.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    assert start(folder, [*SWEEP, *AXES, "hydra.sweep.dir=whole"]).wait() == 0
    whole = time.monotonic() - began
    wrong: list[str] = []
    kills = 0
    for number in range(sweeps):
        name = f"killed{number}"
        for attempt in range(MAX_KILLS):
            found = read_ledger(folder / name)
            process = start(folder, ["resume", name] if found else [*SWEEP, *AXES, f"hydra.sweep.dir={name}"])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(0.5, whole) / (attempt + 1))
                break
            os.killpg(process.pid, signal.SIGKILL)  # the sweep, the server and the jobs
            process.wait()
            kills += 1
        # Jobs that were never queued are missing in the ledger: the repeated command queues them.
        code = start(folder, [*SWEEP, *AXES, f"hydra.sweep.dir={name}"]).wait()
        if code != 0:
            wrong.append(f"{name}: the repeated command ends with {code}: {tail(folder)}")
        wrong += compare(folder, name)
    print(f"{sweeps} sweeps of {JOBS} jobs, {kills} kills, {len(wrong)} wrong; an unbroken sweep takes {whole:.0f} s")
    return wrong


def start(folder: Path, argv: list[str]) -> subprocess.Popen[bytes]:
    """Start the command as the leader of a new process group."""
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "trainkit", *argv], cwd=folder, stdout=output, stderr=output, start_new_session=True
        )


def tail(folder: Path) -> str:
    """Return the end of the output of the last command."""
    return (folder / "output").read_text(errors="replace")[-500:]


def compare(folder: Path, name: str) -> list[str]:
    """Return how the jobs of a killed sweep differ from those of the unbroken one."""
    wanted = {job.config_hash: job for job in read_ledger(folder / "whole")}
    jobs = read_ledger(folder / name)
    wrong = [f"{name}: job {job.number} is {job.status}" for job in jobs if job.status != "completed"]
    lines = (folder / name / "sweep.jsonl").read_text(errors="replace").splitlines()
    queued = Counter(event["config"] for event in map(_event, lines) if event.get("event") == "queued")
    if set(queued) != set(wanted) or max(queued.values()) > 1 or len(jobs) != JOBS:
        wrong.append(f"{name}: the ledger has the jobs {dict(queued)}")
    for job in jobs:
        if job.status == "completed" and job.config_hash in wanted:
            different = differences_of(final_of(job.directory), final_of(wanted[job.config_hash].directory))
            wrong += [f"{name}: job {job.number} differs in {different}"] if different else []
    return wrong


def _event(line: str) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(line)
    except ValueError:  # the line was cut by a kill
        return {}
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, "sweeps", run))

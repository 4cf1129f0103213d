"""Kill searches with SIGKILL, all their processes at once, and compare them with an unbroken search.

    python -m benchmarks.search_kills --searches 10 --seed 0

A killed search is resumed until it ends. It must have the same trials as the unbroken one, in the same order, with the
same values and the same final states, and the ledger and the study must agree. The exit code is 1 otherwise.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_training import differences_of, final_of
from benchmarks.sweep_kills import main, start, tail
from trainkit.sweeps.ledger import read_ledger

SEARCH = (
    *("-m", "model=mlp", "limit_batches=6", "epochs=9", "checkpoint.every_steps=4", "report=off", "progress=plain"),
    *("lr=tag(log,interval(1e-3,3))", "optim=sgd,adam", "optim.momentum=interval(0,0.9)"),
    *("search.trials=10", "search.pruner=asha", "hydra.launcher.n_jobs=1"),
)
MAX_KILLS = 3  # of one search
STATES = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "paused"}


def run(folder: Path, searches: int, seed: int) -> list[str]:
    """Run the unbroken search and the killed ones; return what is wrong.

    Args:
        folder: an empty one.
        searches: how many searches to kill.
        seed: of the moments.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    assert start(folder, [*SEARCH, "hydra.sweep.dir=whole"]).wait() == 0, tail(folder)
    whole = time.monotonic() - began
    wrong: list[str] = []
    kills = 0
    for number in range(searches):
        name = f"killed{number}"
        for attempt in range(MAX_KILLS):
            begun = read_ledger(folder / name)
            process = start(folder, ["resume", name] if begun else [*SEARCH, f"hydra.sweep.dir={name}"])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(1.0, whole) / (attempt + 1))
                break
            os.killpg(process.pid, signal.SIGKILL)  # the search, the server and the jobs
            process.wait()
            kills += 1
        code = start(folder, [*SEARCH, f"hydra.sweep.dir={name}"]).wait()
        if code != 0:
            wrong.append(f"{name}: the repeated command ends with {code}: {tail(folder)}")
        wrong += compare(folder, name)
    print(f"{searches} searches, {kills} kills, {len(wrong)} wrong; an unbroken search takes {whole:.0f} s")
    return wrong


def compare(folder: Path, name: str) -> list[str]:
    """Return how the trials and jobs of a killed search differ from those of the unbroken one."""
    found, wanted = trials_of(folder / name), trials_of(folder / "whole")
    wrong = [] if found == wanted else [f"{name}: the trials differ: {found} and {wanted}"]
    jobs, others = read_ledger(folder / name), read_ledger(folder / "whole")
    statuses = [STATES[state] for _, state, _ in found]
    if [job.status for job in jobs] != statuses or [job.number for job in jobs] != [job.number for job in others]:
        wrong.append(f"{name}: the ledger has {[(job.number, job.status) for job in jobs]}, the study {statuses}")
    for job, other in zip(jobs, others, strict=False):
        different = differences_of(final_of(job.directory), final_of(other.directory))
        wrong += [f"{name}: job {job.number} differs in {different}"] if different else []
    return wrong


def trials_of(directory: Path) -> list[tuple[dict[str, Any], str, dict[int, float]]]:
    """Return the setting, the state and the values of each trial."""
    storage = JournalStorage(JournalFileBackend(str(directory / "study.journal")))
    study = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
    return [(trial.params, trial.state.name, trial.intermediate_values) for trial in study.trials]


if __name__ == "__main__":
    sys.exit(main(__doc__, "searches", run))

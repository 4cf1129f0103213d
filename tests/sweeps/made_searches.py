"""Directories of searches that were not trained: the ledger and the runs that a search writes, in milliseconds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.sweeps.made_runs import make_run
from trainkit.sweeps.ledger import Ledger

MAX_EPOCHS = 9
AXES: list[dict[str, Any]] = [
    {"key": "lr", "kind": "float", "low": 1e-4, "high": 1.0, "log": True},
    {"key": "optim", "kind": "choice", "choices": ["sgd", "adam"]},
    {"key": "model.hidden", "kind": "int", "low": 8, "high": 64, "log": False, "step": 8},
]
SEARCH = {"event": "search", "metric": "val/loss", "mode": "min", "sampler": "tpe", "pruner": "asha", "seed": 0}
SEARCH |= {"seeds": 1, "max_epochs": MAX_EPOCHS, "min_epochs": 1, "reduction": 3, "axes": AXES}
NO_VALUE = math.nan


class Made(NamedTuple):
    """A trial to write.

    Attributes:
        status: of its last repeat; earlier repeats are completed.
        epochs: of its last repeat.
        lr: the learning rate.
        optim: the optimizer.
        value: its best value, reached in its last epoch.
    """

    status: str = "completed"
    epochs: int = MAX_EPOCHS
    lr: float = 0.01
    optim: str = "sgd"
    value: float = 0.5


def make_search(directory: Path, trials: Sequence[Made], *, seeds: int = 1, **settings: Any) -> Path:
    """Write the ledger and the runs of a search.

    Args:
        directory: of the sweep.
        trials: in the order of their numbers.
        seeds: the repeats of each trial. The value of repeat K is K / 100 higher than the first.
        settings: entries of the event `search`.
    """
    directory.mkdir(parents=True)
    ledger = Ledger(directory)
    ledger.append({"event": "sweep", "version": 1, "command": ["trainkit", "-m"], "overrides": []})
    ledger.append({**SEARCH, "seeds": seeds, **settings})
    for number, made in enumerate(trials):
        for repeat in range(seeds):
            made_repeat = made if repeat == seeds - 1 else made._replace(status="completed", epochs=MAX_EPOCHS)
            made_repeat = made_repeat._replace(value=made.value + repeat / 100)
            _make_job(ledger, number * seeds + repeat, number, repeat, made_repeat)
    return directory


def _make_job(ledger: Ledger, number: int, trial: int, repeat: int, made: Made) -> None:
    job = ledger.directory / str(number)
    overrides = ["progress=off", f"lr={made.lr:.17g}", f"optim={made.optim}", f"model.hidden={8 + 8 * (trial % 8)}"]
    queued = {"event": "queued", "job": number, "config": f"c{number}", "overrides": overrides}
    ledger.append({**queued, "directory": job.name, "trial": trial, "repeat": repeat})
    if made.status == "queued":
        return
    ledger.append({"event": "started", "job": number, "attempt": 1, "threads": 1})
    history = [
        {"epoch": epoch, "train/loss": made.value, "val/loss": made.value * (1 + (made.epochs - epoch) / 10)}
        for epoch in range(1, made.epochs + 1)
    ]
    lr = [*overrides[2:], overrides[1], f"seed={repeat}", f"epochs={MAX_EPOCHS}"]  # a choice sets its own lr
    status = "stopped" if made.status in ("pruned", "paused") else made.status
    make_run(job, *lr, history=history, status=status, why=None if status == "completed" else "a cause")
    (job / ".hydra/overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    value = made.value if math.isfinite(made.value) else None
    result = {"metric": "val/loss", "mode": "min", "value": value, "epochs": made.epochs, "seconds": 1.5}
    ledger.append({"event": "ended", "job": number, "status": made.status, "exit_code": 0, "why": None, **result})


def random_trials(number: int, seed: int = 0) -> list[Made]:
    """Return trials of a search whose best learning rate is 0.03, stopped as asha does; the better, the longer."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        lr, optim = 10 ** draw.uniform(-4, 0), draw.choice(["sgd", "adam"])
        value = 0.2 + 0.3 * abs(math.log10(lr / 0.03)) + 0.05 * (optim == "sgd") + draw.uniform(0, 0.05)
        epochs = MAX_EPOCHS if value < 0.4 else 3 if value < 0.7 else 1
        found.append(Made("completed" if epochs == MAX_EPOCHS else "paused", epochs, lr, optim, value))
    return found

"""The result of a search as texts for people and for programs. Imports neither torch, numpy nor Optuna."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from trainkit.core.paths import display_path
from trainkit.core.redaction import REDACTED
from trainkit.display.text import count, number
from trainkit.sweeps.axes import SEED
from trainkit.sweeps.search.results import PRECEDENCE, Search, SearchAxis, Trial

NEAR = 2.0  # the factor within which a value is near an end of its interval
MAX_SHARE = 0.1  # of an interval that is near an end, for narrow intervals
NOT_OF_A_RUN = ("search.", "hydra.", "hydra/")  # overrides that only a sweep has
LR = "lr"


def search_lines(search: Search) -> list[str]:
    """Return what a search has found as lines: trials, saved epochs, the best setting and its command line."""
    counts = ", ".join(
        f"{search.counts[status]} {status}" for status in ("completed", *PRECEDENCE[::-1]) if search.counts[status]
    )
    names = ", ".join(name for name in (search.plan.sampler, search.plan.pruner) if name)
    lines = [f"search{f' ({names})' if names else ''}: {count(len(search.trials), 'trial')}: {counts}"]
    if stops_early(search):
        lines.append(
            f"pruning saved {search.saved_epochs:,} of {search.full_epochs:,} epochs ({saved_percentage(search):.0f} %)"
        )
    best = search.best
    if best is None:
        return [*lines, f"no trial has a finite {search.metric or 'monitored metric'}"]
    value = search.value(best) or 0.0
    lines.append(f"best: trial {best.number}, {search.metric} {number(value)}{_about(search, best)}")
    command = repeat_command(search, best)
    lines.append(f"to repeat it: {command}")
    if REDACTED in command:
        lines.append(f"{REDACTED} in the command is a secret that is not in the files: replace it")
    if best.status == "paused":
        paths = [shlex.quote(display_path(run.directory)) for run in best.runs if run.status == "paused"]
        lines.append(f"to train it to the end: {' && '.join(f'trainkit resume {path}' for path in paths)}")
    return lines + [f"hint: {hint}" for hint in hints(search)]


def _about(search: Search, trial: Trial) -> str:
    """Return how far a trial was trained, and over how many seeds its value is a mean."""
    parts = [f"the mean of {len(trial.runs)} seeds"] if len(trial.runs) > 1 else []
    if trial.status != "completed":
        full = search.plan.max_epochs
        total = f" of {full * search.plan.seeds}" if full else ""
        parts.append(f"{trial.status} after {trial.epochs}{total} epochs")
    return f" ({', '.join(parts)})" if parts else ""


def stops_early(search: Search) -> bool:
    """Return whether the search has stopped a trial before its last epoch."""
    return bool(search.full_epochs and (search.counts["pruned"] or search.counts["paused"]))


def saved_percentage(search: Search) -> float:
    """Return the share of the epochs that pruning has saved, in percent."""
    return 100 * search.saved_epochs / search.full_epochs if search.full_epochs else 0.0


def repeat_command(search: Search, trial: Trial) -> str:
    """Return the command line that trains the setting of a trial again, with the same seeds, to the last epoch."""
    words = _overrides(trial)
    seeds = list(dict.fromkeys(run.seed for run in trial.runs if run.seed is not None))
    words += [f"{SEED}={','.join(map(str, seeds))}"] if seeds else []
    return shlex.join(["trainkit", *_config_dir(search), *["-m"] * (len(seeds) > 1), *words])


def _config_dir(search: Search) -> list[str]:
    """Return the words that name the folder with configs."""
    return [] if search.plan.config_dir is None else ["-cd", search.plan.config_dir]


def _overrides(trial: Trial, without: Sequence[str] = ()) -> list[str]:
    """Return the overrides of a trial, without the seed and what only a sweep has."""
    dropped = (SEED, *without)
    return [
        text
        for text in trial.runs[0].overrides
        if text.partition("=")[0].lstrip("+") not in dropped and not text.lstrip("+").startswith(NOT_OF_A_RUN)
    ]


def hints(search: Search) -> list[str]:
    """Return what a user could do next: about the learning rate, if it was searched."""
    best = search.best
    found = []
    for axis in search.plan.axes:
        if best is None or axis.key.rpartition(".")[2] != LR:
            continue
        value = best.runs[0].config.get(axis.key)
        end = near_end(axis, value) if isinstance(value, int | float) else None
        if end is not None:
            found.append(
                f"the best {axis.key}, {value:.4g}, is near the {end} end of its interval "
                f"[{axis.low:g}, {axis.high:g}]: search a wider interval"
            )
        command = shlex.join(["trainkit", "find-lr", *_config_dir(search), *_overrides(best, [axis.key])])
        found.append(f"to see the loss against the learning rate: {command}")
    return found


def near_end(axis: SearchAxis, value: float) -> str | None:
    """Return `lower` or `upper` if a value is within a factor of 2 of this end of its interval, else None.

    In an interval that is narrow, a tenth of it is near an end: of its logarithm if the axis is logarithmic. So is a
    twentieth of an interval that includes 0.
    """
    low, high = axis.low, axis.high
    if low is None or high is None or low >= high:
        return None
    if low > 0 and value > 0:
        factor = min(math.log(NEAR), MAX_SHARE * math.log(high / low))
        near_low, near_high = math.log(value / low) <= factor, math.log(high / value) <= factor
    else:
        margin = MAX_SHARE / 2 * (high - low)
        near_low, near_high = value - low <= margin, high - value <= margin
    return "lower" if near_low else "upper" if near_high else None


def trial_dict(trial: Trial) -> dict[str, Any]:
    """Return a trial as plain values for JSON."""
    return {"trial": trial.number, "status": trial.status, "epochs": trial.epochs}


def search_dict(search: Search) -> dict[str, Any]:
    """Return a search as plain values for JSON."""
    best = search.best
    return {
        "directory": str(search.directory),
        "metric": search.metric,
        "mode": search.mode,
        "sampler": search.plan.sampler,
        "pruner": search.plan.pruner,
        "trials": dict(search.counts),
        "epochs": {
            "trained": sum(trial.epochs for trial in search.trials),
            "saved": search.saved_epochs,
            "full": search.full_epochs,
        },
        "best": None
        if best is None
        else trial_dict(best) | {"value": search.value(best), "command": repeat_command(search, best)},
        "hints": hints(search),
    }

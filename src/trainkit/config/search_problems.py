"""Find what is wrong with the keys of a search, in the settings of its jobs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from trainkit.config.schema import SearchSettings
from trainkit.config.search_space import Space
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, Problem

RUNG_PRUNERS = ("asha", "hyperband")  # which need the length of a full training


def find_search_problems(space: Space, jobs: Sequence[Settings]) -> Iterator[Problem]:
    """Yield what is wrong with the keys of a search.

    Args:
        space: of the search.
        jobs: the settings of some jobs, which together use each value.
    """
    search = jobs[0].search
    if not space.axes:
        yield Problem("the search has no key to vary", "write for example 'lr=tag(log,interval(1e-4,1))'")
    yield from _find_missing_packages(search)
    yield from _find_differences(space, jobs)
    if search.seeds > 1 and any(axis.name == "seed" for axis in space.axes):
        yield Problem(f"search.seeds={search.seeds}: the search varies seed already", "write search.seeds=1")
    if search.trials is search.minutes is search.epochs is None and search.sampler != "grid":
        yield Problem("the search has no end", "write search.trials=N, search.minutes=M or search.epochs=E")
    if jobs[0].monitor.mode == "auto":
        metric = jobs[0].monitor.metric
        cause = f"monitor.mode=auto: a search must know before its first job whether lower or higher {metric} is better"
        yield Problem(cause, "write monitor.mode=min or monitor.mode=max")
    yield from _find_sampler_problems(space, search)
    yield from _find_length_problems(space, jobs)
    if search.pruner == "asha" and any(job.checkpoint is None for job in jobs):
        cause = "search.pruner=asha continues paused trials from their checkpoints, and checkpoint is off"
        yield Problem(cause, "remove checkpoint=off, or choose a pruner that stops for ever: search.pruner=hyperband")


def _find_missing_packages(search: SearchSettings) -> Iterator[Problem]:
    packages = ["optuna", *{"cmaes": ["cmaes"], "qmc": ["scipy"], "gp": ["scipy"]}.get(search.sampler, [])]
    packages += ["scipy"] if search.pruner == "wilcoxon" else []
    for package in dict.fromkeys(packages):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of the package's name does not count
            hint = "install it: pip install 'trainkit[search]'"
            yield Problem(f"a search needs the package {package}, which is not installed", hint)


def _find_differences(space: Space, jobs: Sequence[Settings]) -> Iterator[Problem]:
    """Yield each key that must have one value in the whole search, and has several."""
    found: dict[str, set[Any]] = {
        "monitor.metric": {job.monitor.metric for job in jobs},
        "monitor.mode": {job.monitor.mode for job in jobs},
        **{f"search.{name}": {getattr(job.search, name) for job in jobs} for name in vars(jobs[0].search)},
    }
    groups = ", ".join(axis.name for axis in space.groups)
    for key, values in found.items():
        if len(values) > 1:
            shown = ", ".join(sorted("off" if value is None else str(value) for value in values))
            by = "" if any(axis.name == key for axis in space.axes) or not groups else f" by the choice of {groups}"
            cause = f"{key} has several values{by} ({shown}), and must be the same for the whole search"
            yield Problem(cause, f"write {key}=VALUE on the command line")


def _find_sampler_problems(space: Space, search: SearchSettings) -> Iterator[Problem]:
    """Yield why a sampler cannot sample the space."""
    if search.sampler in ("cmaes", "qmc") and not space.numbers_only:
        keys = ", ".join(axis.name for axis in space.axes if axis.kind == "choice")
        hint = "write search.sampler=tpe (or random, gp), or give the key a single value"
        yield Problem(f"search.sampler={search.sampler} samples numbers only, and {keys} has choices", hint)
    elif search.sampler == "grid":
        try:
            space.combinations()
        except ConfigError as error:
            yield from error.problems
    elif search.sampler == "cmaes" and len(space.axes) == 1:
        yield Problem("search.sampler=cmaes needs at least two keys", "write search.sampler=tpe")


def _find_length_problems(space: Space, jobs: Sequence[Settings]) -> Iterator[Problem]:
    """Yield contradictions about the number of epochs of a full training."""
    search, first = jobs[0].search, jobs[0]
    steps = next((job.steps for job in jobs if job.steps is not None), None)
    if search.max_epochs is not None:
        if steps is not None:
            cause = f"search.max_epochs={search.max_epochs} and steps={steps}: a run has one of them"
            yield Problem(cause, "remove steps, or remove search.max_epochs")
        if any(axis.name == "epochs" for axis in space.axes):
            cause = f"search.max_epochs={search.max_epochs} sets the epochs of each job, and the search varies epochs"
            yield Problem(cause, "remove search.max_epochs, or give epochs a single value")
    elif search.pruner in RUNG_PRUNERS and (first.epochs is None or steps is not None):
        hint = "write search.max_epochs=N" if steps is None else "write epochs=N instead of steps=N"
        yield Problem(f"search.pruner={search.pruner} needs the number of epochs of a full training", hint)
        return
    elif search.pruner in RUNG_PRUNERS and any(job.epochs != first.epochs for job in jobs):
        cause = f"search.pruner={search.pruner} compares trainings of the same length, and epochs varies"
        yield Problem(cause, "give epochs a single value on the command line, or write search.pruner=median")
    longest = search.max_epochs or first.epochs
    if search.pruner in RUNG_PRUNERS and longest is not None and search.min_epochs >= longest:
        cause = f"search.min_epochs={search.min_epochs}: a full training has {longest} epochs"
        yield Problem(cause, "write a lower search.min_epochs, or a higher search.max_epochs")


def find_float_ends(space: Space, problem: Problem) -> Problem:
    """Return a problem with a better fix if it is that a key needs whole numbers, and its interval has fractions."""
    for axis in space.axes:
        ends = [f"{axis.override(end)}: must be a whole number" for end in axis.ends]
        if axis.kind == "float" and problem.cause.startswith(tuple(ends)):
            inner = f"interval({axis.low:g},{axis.high:g})"
            inner = f"tag(log,{inner})" if axis.log else inner
            cause = f"{axis.key}={inner}: {axis.name} must be a whole number"
            return Problem(cause, f"write '{axis.key}=int({inner})'")
    return problem

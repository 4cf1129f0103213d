"""Find keys of `data` that contradict each other, and wrong names of samplers, collate functions and custom steps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trainkit.config.consistency import UNKNOWN
from trainkit.config.hints import is_off
from trainkit.config.schema import COLLATES, SAMPLERS, SUPERVISED
from trainkit.config.static_targets import find_missing_target
from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean


def find_data_problems(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the sampler, the collate function and the folds."""
    data = plain.get("data")
    if isinstance(data, dict):
        yield from _named("data.sampler", data.get("sampler"), SAMPLERS)
        yield from _named("data.collate", data.get("collate"), COLLATES)
        yield from _folds(data)
        if not is_off(data.get("standardize")) and not is_off(data.get("normalize")):
            cause = "data.standardize: data.normalize gives the mean and the standard deviation"
            yield Problem(cause, "write data.normalize=null or data.standardize=off")


def find_wrong_steps(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the custom steps."""
    for key in ("training_step", "evaluation_step"):
        yield from _named(key, plain.get(key), (SUPERVISED,))


def _named(path: str, value: Any, names: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the value of a key: one of the short names, a dotted path, or a node."""
    if is_off(value) or value is UNKNOWN or (isinstance(value, str) and value in names):
        return
    if isinstance(value, dict) and "_target_" not in value:
        hint = f"add +{path}._target_=a.dotted.Path"
        yield Problem(f"{path}: it has no _target_, so nothing can be built from it", hint)
    elif isinstance(value, str) and "." not in value:
        kind = path.rpartition(".")[2]
        hint = did_you_mean(value, names, f"{path}=")
        yield Problem(f"{path}={value}: there is no {kind} of this name", f"{hint}; or write a dotted path")
    elif isinstance(value, str) and (problem := find_missing_target(value)):
        yield Problem(f"{path}={value}: {problem.cause}", problem.hint)


def _folds(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield contradictions between the folds, the fold and the validation set."""
    folds, fold = data.get("folds"), data.get("fold")
    if UNKNOWN in (folds, fold) or (is_off(folds) and is_off(fold)):
        return
    if is_off(folds):
        yield Problem(f"data.fold={fold}: data.folds is off", "write the number of folds: data.folds=5")
        return
    if is_off(fold):
        hint = f"choose one: data.fold=0, or train all: -m 'data.fold=range({folds})'"
        yield Problem(f"data.folds={folds}: data.fold is off", hint)
    elif isinstance(fold, int) and isinstance(folds, int) and fold >= folds:
        hint = f"the last fold is data.fold={folds - 1}"
        yield Problem(f"data.fold={fold}: the folds have the numbers 0 to {folds - 1}", hint)
    for key, value in (("split", data.get("split")), ("val", data.get("val"))):
        # The data sets of trainkit may return no validation set, which is known once they are built.
        is_own = isinstance(value, dict) and str(value.get("_target_")).startswith("trainkit.data.")
        if not is_off(value) and value is not UNKNOWN and not is_own:
            shown = "" if isinstance(value, dict) else f"={value}"
            yield Problem(f"data.{key}{shown}: the fold is the validation set", f"write data.{key}=null")

"""Find keys of `data` that contradict each other, and wrong names of samplers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainkit.config.consistency import UNKNOWN
from trainkit.config.hints import is_off
from trainkit.config.schema import SAMPLERS
from trainkit.config.static_targets import find_missing_target
from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean


def find_data_problems(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the order and the folds of the training set."""
    data = plain.get("data")
    if isinstance(data, dict):
        yield from _sampler(data.get("sampler"))
        yield from _folds(data)


def _sampler(sampler: Any) -> Iterator[Problem]:
    """Yield what is wrong with `data.sampler`: a short name, a dotted path, or a node."""
    if is_off(sampler) or sampler is UNKNOWN or sampler in SAMPLERS:
        return
    if isinstance(sampler, dict) and "_target_" not in sampler:
        hint = "add +data.sampler._target_=a.dotted.Path"
        yield Problem("data.sampler: it has no _target_, so nothing can be built from it", hint)
    elif isinstance(sampler, str) and "." not in sampler:
        hint = did_you_mean(sampler, SAMPLERS, "data.sampler=")
        yield Problem(f"data.sampler={sampler}: there is no sampler of this name", f"{hint}; or write a dotted path")
    elif isinstance(sampler, str) and (problem := find_missing_target(sampler)):
        yield Problem(f"data.sampler={sampler}: {problem.cause}", problem.hint)


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
        if not is_off(value) and value is not UNKNOWN:
            shown = "" if isinstance(value, dict) else f"={value}"
            yield Problem(f"data.{key}{shown}: the fold is the validation set", f"write data.{key}=null")

"""ASHA's decisions, compared with a plain ranking."""

from __future__ import annotations

import math
import random

import pytest

from trainkit.sweeps.search.asha import Asha
from trainkit.sweeps.search.study import PAUSED, Trial


def trial(number: int, rungs: dict[int, float], state: str = PAUSED) -> Trial:
    """Return a trial that has reached some rungs."""
    return Trial(number, state, [], 0, None, rungs, {}, {}, {})


@pytest.mark.parametrize(
    ("shape", "rungs"),
    [
        ((1, 27, 3), [1, 3, 9, 27]),
        ((1, 20, 3), [1, 3, 9, 20]),
        ((2, 9, 2), [2, 4, 8, 9]),
        ((4, 5, 3), [4, 5]),
    ],
)
def test_the_rungs_grow_by_the_reduction_up_to_a_full_training(shape: tuple[int, int, int], rungs: list[int]) -> None:
    assert Asha(*shape, mode="min").rungs == rungs


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_one_in_reduction_of_the_trials_at_a_rung_may_continue(mode: str, reduction: int) -> None:
    draw = random.Random(0)
    asha = Asha(1, 100, reduction, mode)
    for count in range(1, 30):
        values = [draw.choice([1.0, 2.0, draw.random(), math.nan, math.inf]) for _ in range(count)]
        trials = [trial(number, {1: value}) for number, value in enumerate(values)]
        chosen = [found.number for found in trials if asha.may_continue(found, 1, trials)]
        assert len(chosen) == count // reduction
        finite = sorted((v if mode == "min" else -v) for v in values if math.isfinite(v))
        kept = [values[number] if mode == "min" else -values[number] for number in chosen]
        wanted = finite[: len(kept)]
        assert sorted(value for value in kept if math.isfinite(value)) == wanted


def test_the_best_paused_trial_of_the_highest_rung_is_promoted_first() -> None:
    asha = Asha(1, 9, 2, "min")
    trials = [trial(0, {1: 0.1}), trial(1, {1: 0.5}), trial(2, {1: 0.2, 2: 0.2}), trial(3, {1: 0.3, 2: 0.1})]
    found = asha.find_promotable(trials)
    assert found is not None
    assert (found[0].number, found[1]) == (3, 4)
    trials[3].state = "running"
    found = asha.find_promotable(trials)
    assert found is not None
    assert (found[0].number, found[1]) == (0, 2)


def test_failed_trials_and_trials_that_run_are_not_promoted() -> None:
    asha = Asha(1, 9, 2, "min")
    assert asha.find_promotable([trial(0, {1: 0.1}, "failed"), trial(1, {1: 0.2}), trial(2, {1: 0.3})]) == (
        asha.find_promotable([trial(1, {1: 0.2}), trial(2, {1: 0.3})])
    )
    assert asha.find_promotable([trial(0, {1: 0.1}, "running"), trial(1, {1: 0.2}, "completed")]) is None

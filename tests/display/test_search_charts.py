"""The charts of a search: where values are drawn, and that any value and any text can be drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest

from tests.display.test_report import HOSTILE, assert_safe
from trainkit.display.charts import Drawing, draw_svg
from trainkit.display.parallel_coordinates import NOT_SET, height, parallel_coordinates, tick_text, tick_values
from trainkit.display.search_charts import (
    SampledKey,
    TrialFacts,
    best_by_epochs,
    best_by_trial,
    best_so_far,
    importance_bars,
    intermediate_values,
    usual_range,
    value_by_key,
)
from trainkit.display.search_report import SearchFacts
from trainkit.display.sweep_report import SweepFacts, sweep_page

LR = SampledKey("lr", 1e-4, 1.0, log=True)
OPTIM = SampledKey("optim", choices=["sgd", "adam", "lion"])
DROPOUT = SampledKey("dropout", 0.0, 0.5)


def made_trials(values: Sequence[float | None]) -> list[TrialFacts]:
    """Return trials with these values."""
    statuses = ("completed", "paused", "pruned", "failed")
    return [
        TrialFacts(
            number,
            statuses[number % 4],
            value,
            {"lr": 0.01, "optim": "adam", **({"dropout": 0.1} if number % 2 else {})},
            [[(1, math.nan if value is None else value), (2, 0.5)]],
        )
        for number, value in enumerate(values)
    ]


def all_drawings(trials: Sequence[TrialFacts]) -> list[Drawing]:
    """Return each chart of a search."""
    keys = [LR, OPTIM, DROPOUT]
    return [
        best_by_trial(trials, "val/loss", "min"),
        best_by_epochs([(1, 0.5), (9, 0.1)], "val/loss"),
        intermediate_values(trials, "val/loss"),
        *(value_by_key(trials, key, "val/loss", "min") for key in keys),
        parallel_coordinates(trials, keys, "val/loss", "max"),
        importance_bars({"lr": 0.9, "optim": 0.1}),
    ]


def test_a_logarithmic_key_has_equal_distances_for_equal_ratios() -> None:
    assert [height(LR, value) for value in (1e-4, 1e-3, 1e-2, 0.1, 1.0)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [height(LR, value) for value in tick_values(LR)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [height(DROPOUT, value) for value in (0.0, 0.25, 0.5)] == pytest.approx([0, 0.5, 1])
    assert [height(OPTIM, choice) for choice in OPTIM.choices] == [0, 0.5, 1]


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1.0), (1e-30, 1e30), (3e-3, 2e5), (0.02, 0.03), (1, 11)])
def test_the_ticks_of_a_logarithmic_key_are_few_ascending_and_apart(low: float, high: float) -> None:
    key = SampledKey("lr", low, high, log=True)
    ticks = tick_values(key)
    heights = [height(key, tick) for tick in ticks]
    assert (ticks[0], ticks[-1]) == (low, high)
    assert 3 <= len(ticks) <= 8
    assert all(after - before > 0.05 for before, after in pairwise(heights))


def test_a_value_that_a_trial_does_not_have_is_below_the_axis() -> None:
    for key in (LR, OPTIM, DROPOUT):
        assert height(key, None) == NOT_SET < 0
    assert height(OPTIM, "unknown") == height(LR, -1.0) == height(LR, math.nan) == NOT_SET


def test_values_beyond_an_axis_are_at_its_end_and_the_end_says_so() -> None:
    assert (height(DROPOUT, 7.0), height(DROPOUT, -7.0)) == (1, 0)
    key = SampledKey("val/loss", 0.0, 2.0, beyond="high")
    assert [tick_text(key, value) for value in (0.0, 1.0, 2.0)] == ["0", "1", "≥ 2"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_value_so_far_equals_the_running_minimum_or_maximum(mode: str) -> None:
    values = [0.5, 0.7, 0.3, 0.3, 0.9, 0.2, 0.4]
    steps = best_so_far(list(enumerate(values)), mode)
    for place in range(len(values)):
        expected = (min if mode == "min" else max)(values[: place + 1])
        assert [value for x, value in steps if x <= place][-1] == expected
    assert steps[-1][0] == len(values) - 1
    assert best_so_far([], mode) == []


def test_a_trial_that_diverged_does_not_hide_how_the_others_differ() -> None:
    values = [0.1, 0.2, 0.3, 0.4, 1e5]
    low, high = usual_range(values, "min")
    assert [low <= value <= high for value in values] == [True] * 4 + [False]
    low, high = usual_range([-value for value in values], "max")
    assert [low <= -value <= high for value in values] == [True] * 4 + [False]
    assert usual_range(values, "") == (-math.inf, math.inf)
    assert usual_range([0.1, 0.1, 0.1, 5.0], "min") == (-math.inf, math.inf)  # the median is the best
    svg = draw_svg(best_by_trial(made_trials(values), "val/loss", "min"), 1)
    assert "1 worse trial outside" in svg
    assert not re.search(r">10+</text>", svg)


@pytest.mark.parametrize(
    "values",
    [[], [None], [0.5], [0.5] * 9, [math.nan, math.inf], [1e308, -1e308, 0.0], [1e-30, 1.0, 1e30], [-1.0, -2.0]],
    ids=str,
)
def test_trials_with_any_values_can_be_drawn(values: list[float | None]) -> None:
    for place, drawing in enumerate(all_drawings(made_trials(values))):
        assert draw_svg(drawing, place).startswith("<svg")


def test_each_trial_has_a_name_for_the_pointer_and_each_chart_a_description() -> None:
    trials = made_trials([0.5, 0.25])
    for drawing in all_drawings(trials):
        svg = draw_svg(drawing, 1)
        assert f'aria-label="{drawing.description}"' in svg
        assert all(f"<title>{name}</title>" in svg for name in drawing.names)
    assert trials[1].label == "trial 1 lr=0.01 optim=adam dropout=0.1 paused: 0.2500"


def test_stopped_trials_have_dashes_and_markers() -> None:
    trials = made_trials([0.5, 0.25, 0.3])
    svg = draw_svg(intermediate_values(trials, "val/loss"), 1)
    dashed = [part for part in svg.split("<g>") if "stroke-dasharray" in part and "<title>trial" in part]
    assert [re.search(r"trial (\d)", part)[1] for part in dashed] == ["2", "1"]
    assert svg.count("<use ") >= 2


def hostile_search() -> SearchFacts:
    """Return a search whose every text is hostile."""
    keys = [SampledKey(HOSTILE, 1.0, 2.0), SampledKey(f"b{HOSTILE}", choices=[HOSTILE, f"{HOSTILE}2"])]
    values: dict[str, float | str] = {HOSTILE: 1.5, f"b{HOSTILE}": HOSTILE}
    trial = TrialFacts(0, HOSTILE, 0.5, values, [[(1, 0.5), (2, 0.4)]])
    return SearchFacts(
        HOSTILE,
        HOSTILE,
        "min",
        [HOSTILE],
        HOSTILE,
        [trial],
        keys,
        [(1, 0.5)],
        {HOSTILE: 1.0},
        HOSTILE,
        (HOSTILE, HOSTILE),
    )


def test_hostile_texts_of_a_search_stay_text() -> None:
    assert_safe(sweep_page(SweepFacts("sweep", searches=[hostile_search()])))
    assert_safe(sweep_page(SweepFacts("sweep", searches=[hostile_search(), SearchFacts()])))


def test_the_charts_of_two_searches_have_different_ids() -> None:
    searches = [SearchFacts(name, "val/loss", trials=made_trials([0.5] * 9), keys=[LR]) for name in ("a", "b")]
    text = sweep_page(SweepFacts("sweep", searches=searches))
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 2
    assert text.count('<svg class="chart"') == 2 * 4

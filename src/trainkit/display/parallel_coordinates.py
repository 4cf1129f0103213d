"""The parallel coordinates of a search: a line for each trial through its values to its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trainkit.core.terminal import printable
from trainkit.display.charts import INK, LINE, LOG_RATIO, MUTED, PAPER, SERIES, Drawing, set_style, short_label
from trainkit.display.search_charts import SampledKey, TrialFacts, style_of, usual_range
from trainkit.display.text import count

WIDE = (9.6, 3.6)  # inches
MAX_AXES = 12  # more are not readable
NOT_SET = -0.12  # the height of a key that a trial does not have
MAX_TICKS, MIN_GAP = 6, 0.06  # powers of ten beside an axis, and their distance from its ends
BEST_SHARE, MIN_BEST = 0.1, 5  # the trials that stand out


def parallel_coordinates(trials: Sequence[TrialFacts], keys: Sequence[SampledKey], metric: str, mode: str) -> Drawing:
    """Return a line for each trial through its value of each key to its value of the metric.

    Args:
        trials: the best first. Trials without a value are left out.
        keys: one upright axis each; logarithmic if the key is sampled so.
        metric: the last axis. Far worse values than the others are at its end.
        mode: `min` or `max`.
    """
    drawn = [trial for trial in trials if math.isfinite(trial.drawn)]
    last = _metric_key(drawn, metric, mode)
    best = count_best(drawn)

    def draw(axes: Any) -> None:
        columns = [*keys[:MAX_AXES], last]
        for index, trial in reversed(list(enumerate(drawn))):
            values = {**trial.values, last.name: trial.drawn}
            heights = [height(column, values.get(column.name)) for column in columns]
            color, width = (INK, 2.4) if not index else (SERIES[0], 1.4) if index < best else (MUTED, 0.7)
            (line,) = axes.plot(range(len(columns)), heights, color=color, linewidth=width)
            line.set_gid(f"curve-{index}")
            if style_of(trial.status).dashes:
                line.set_dashes(style_of(trial.status).dashes)
        _draw_columns(axes, columns, {key.name for key in keys if any(key.name not in t.values for t in drawn)})

    title = "parallel coordinates"
    names = ", ".join([key.name for key in keys[:MAX_AXES]] + [metric])
    return Drawing(title, f"{title} of {count(len(drawn), 'trial')}: {names}", draw, [t.label for t in drawn], WIDE)


def count_best(trials: Sequence[TrialFacts]) -> int:
    """Return how many trials stand out in the parallel coordinates."""
    drawn = sum(math.isfinite(trial.drawn) for trial in trials)
    return min(drawn, max(MIN_BEST, round(BEST_SHARE * drawn)))


def _metric_key(trials: Sequence[TrialFacts], metric: str, mode: str) -> SampledKey:
    """Return the axis of the metric."""
    values = [trial.drawn for trial in trials] or [0.0]
    low, high = usual_range(values, mode)
    usual = [value for value in values if low <= value <= high]
    low, high = min(usual), max(usual)
    beyond = "" if len(usual) == len(values) else "low" if mode == "max" else "high"
    is_log = low > 0 and high / low > LOG_RATIO
    return SampledKey(f"{metric} ", low, high, log=is_log, beyond=beyond)  # no key has this name


def height(key: SampledKey, value: float | str | None) -> float:
    """Return the height of a value on its axis, from 0 to 1; `NOT_SET` if there is no value."""
    if isinstance(value, str):
        return key.choices.index(value) / max(1, len(key.choices) - 1) if value in key.choices else NOT_SET
    if value is None or key.low is None or key.high is None or not math.isfinite(value):
        return NOT_SET
    low, high, place = key.low, key.high, float(value)
    if key.log:
        if place <= 0:
            return NOT_SET
        low, high, place = math.log(low), math.log(high), math.log(place)
    return min(1.0, max(0.0, (place - low) / (high - low))) if high > low else 0.5


def _draw_columns(axes: Any, columns: Sequence[SampledKey], incomplete: set[str]) -> None:
    """Draw the upright axes with their ticks. Some trials do not have the keys of `incomplete`."""
    set_style(axes)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(-0.3, len(columns) - 0.3)
    axes.set_ylim((NOT_SET if incomplete else 0) - 0.05, 1.06)
    axes.set_yticks([])
    axes.set_xticks(range(len(columns)), [short_label(key.name) for key in columns], parse_math=False)
    for place, key in enumerate(columns):
        axes.plot([place, place], [0, 1], color=LINE, linewidth=1.5, zorder=0.5)
        ticks = [(height(key, text), printable(text)[:20]) for text in key.choices]
        ticks += [(height(key, value), tick_text(key, value)) for value in tick_values(key)]
        ticks += [(NOT_SET, "not set")] if key.name in incomplete else []
        for level, text in ticks:
            where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.8}  # the lines behind stay visible
            axes.annotate(text, (place, level), fontsize=8, color=INK, parse_math=False, bbox=box, **where)


def tick_values(key: SampledKey) -> list[float]:
    """Return the numbers beside an axis: its ends, and powers of ten or equal parts between them."""
    if key.low is None or key.high is None:
        return []
    if key.low == key.high:
        return [key.low]
    low, high = key.low, key.high
    if not key.log:
        return [low + (high - low) * place / 4 for place in range(5)]
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    powers = [10.0**exponent for exponent in exponents[:: math.ceil(len(exponents) / MAX_TICKS) or 1]]
    powers = [power for power in powers if MIN_GAP < height(key, power) < 1 - MIN_GAP]
    return [low, *(powers or [low * (high / low) ** (place / 4) for place in range(1, 4)]), high]


def tick_text(key: SampledKey, value: float) -> str:
    """Return the text of a number beside an axis."""
    sign = {("high", key.high): "≥ ", ("low", key.low): "≤ "}.get((key.beyond, value), "")
    return f"{sign}{value:.3g}"

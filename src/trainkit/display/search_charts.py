"""The charts of a search: the best value, all trials, and the sampled keys. Imports matplotlib only to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.display.charts import (
    INK,
    LARGEST,
    LOG_RATIO,
    MUTED,
    SERIES,
    Drawing,
    set_log_axis,
    set_style,
    short_label,
)
from trainkit.display.text import count, number

MAX_BARS = 12
OUTLIER = 10.0  # a value is outside a chart if it is this many times as far from the median as the best value is
GOLDEN = 0.618  # spreads points with the same choice


@dataclass(frozen=True)
class Style:
    """How the trials of a status are drawn: colours alone are not enough.

    Attributes:
        color: a colour of `SERIES`, or grey.
        dashes: of the line.
        marker: of matplotlib.
        is_hollow: whether the marker is not filled.
    """

    color: str
    dashes: tuple[float, ...] = ()
    marker: str = "o"
    is_hollow: bool = False


STYLES = {
    "completed": Style(SERIES[0]),
    "paused": Style(SERIES[1], (5, 2), is_hollow=True),
    "pruned": Style(SERIES[4], (1.5, 1.5), "x"),
}
OTHER = Style(MUTED, (6, 2, 1.5, 2), "+")


@dataclass(frozen=True)
class SampledKey:
    """A key that the search samples.

    Attributes:
        name: of the key.
        low: the lower end of its interval; None: it is a choice.
        high: the upper end of its interval; None: it is a choice.
        log: whether it is sampled logarithmically.
        choices: the values of a choice, as texts.
        beyond: `high` or `low` if values beyond this end are drawn at the end.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: Sequence[str] = ()
    beyond: str = ""


@dataclass(frozen=True)
class TrialFacts:
    """What the charts show of a trial.

    Attributes:
        number: of the trial.
        status: of the trial.
        value: its best value; None: it has none, or it is not compared.
        values: the sampled keys that it has: a number, or the text of a choice.
        curves: the epochs and the values of the monitored metric, for each repeat.
    """

    number: int
    status: str
    value: float | None = None
    values: Mapping[str, float | str] = field(default_factory=dict)
    curves: Sequence[Sequence[tuple[float, float]]] = ()

    @property
    def setting(self) -> str:
        """The trial with its values."""
        values = self.values.items()
        return " ".join(
            [f"trial {self.number}", *(f"{key}={v:.4g}" if isinstance(v, float) else f"{key}={v}" for key, v in values)]
        )

    @property
    def label(self) -> str:
        """What the pointer shows."""
        return f"{self.setting} {self.status}" + ("" if self.value is None else f": {number(self.value)}")

    @property
    def drawn(self) -> float:
        """The value if it can be drawn, else NaN."""
        return drawable(self.value)


def drawable(value: float | None) -> float:
    """Return a value if matplotlib can scale its axis, else NaN."""
    return math.nan if value is None or not abs(value) <= LARGEST else float(value)


def style_of(status: str) -> Style:
    """Return how the trials of a status are drawn."""
    return STYLES.get(status, OTHER)


# ------------------------------------------------------------------------------------ over time


def best_by_trial(trials: Sequence[TrialFacts], metric: str, mode: str) -> Drawing:
    """Return the value of each trial and the best value so far, in the order of the trials.

    Args:
        trials: in any order.
        metric: the monitored metric.
        mode: `min` or `max`.
    """
    points = sorted((trial for trial in trials if math.isfinite(trial.drawn)), key=lambda trial: trial.number)
    steps = best_so_far([(trial.number, trial.drawn) for trial in points], mode)

    def draw(axes: Any) -> None:
        draw_steps(axes, steps)
        for index, trial in enumerate(points):
            draw_point(axes, trial.number, trial, index)
        finish(axes, "trial", [trial.drawn for trial in points], mode)

    title = f"best {metric} by trial"
    return Drawing(title, describe_steps(title, steps, "trial"), draw, [trial.label for trial in points])


def best_by_epochs(steps: Sequence[tuple[float, float]], metric: str) -> Drawing:
    """Return the best value so far against the epochs that all trials have trained.

    Args:
        steps: the total epochs and the best value, whenever it changes, and at the end.
        metric: the monitored metric.
    """
    shown = [(epochs, value) for epochs, value in steps if math.isfinite(drawable(value))]

    def draw(axes: Any) -> None:
        draw_steps(axes, shown)
        finish(axes, "epochs of all trials", [value for _, value in shown])

    title = f"best {metric} by epochs"
    return Drawing(title, describe_steps(title, shown, "epoch"), draw)


def best_so_far(points: Sequence[tuple[float, float]], mode: str) -> list[tuple[float, float]]:
    """Return the points at which the best value changes, and the last point with the best value."""
    steps: list[tuple[float, float]] = []
    for x, value in points:
        if not steps or (value > steps[-1][1] if mode == "max" else value < steps[-1][1]):
            steps.append((x, value))
    if steps and points[-1][0] > steps[-1][0]:
        steps.append((points[-1][0], steps[-1][1]))
    return steps


def describe_steps(title: str, steps: Sequence[tuple[float, float]], unit: str) -> str:
    """Return the best value over time in words."""
    if not steps:
        return f"{title}: no finite value"
    (first, start), (last, end) = steps[0], steps[-1]
    return f"{title}: from {number(start)} at {unit} {first:g} to {number(end)} at {unit} {last:g}"


def intermediate_values(trials: Sequence[TrialFacts], metric: str) -> Drawing:
    """Return a curve for each repeat of each trial; the end of a trial that was stopped early has a marker.

    Args:
        trials: the best first.
        metric: the monitored metric.
    """
    curves = [(trial, curve) for trial in trials for curve in trial.curves if curve]
    width = 1.2 if len(curves) <= 50 else 0.7

    def draw(axes: Any) -> None:
        for index, (trial, curve) in reversed(list(enumerate(curves))):  # the best one last, so that it is on top
            style, is_best = style_of(trial.status), trial is trials[0]
            color, thick = (INK, 2.2) if is_best else (style.color, width)
            values = [drawable(value) for _, value in curve]
            (line,) = axes.plot([epoch for epoch, _ in curve], values, color=color, linewidth=thick)
            line.set_gid(f"curve-{index}")
            if style.dashes:
                line.set_dashes(style.dashes)
            if trial.status != "completed" or len(curve) == 1:
                draw_marker(axes, curve[-1][0], values[-1], style, 4)
        finish(axes, "epoch", [drawable(value) for _, curve in curves for _, value in curve])

    numbers = [trial.status for trial, _ in curves]
    sizes = ", ".join(f"{numbers.count(status)} {status}" for status in dict.fromkeys(numbers))
    title = f"{metric} of all trials"
    return Drawing(
        title, f"{title} by epoch: {count(len(curves), 'curve')}: {sizes}", draw, [t.label for t, _ in curves]
    )


# ------------------------------------------------------------------------------------- over keys


def value_by_key(trials: Sequence[TrialFacts], key: SampledKey, metric: str, mode: str) -> Drawing:
    """Return the value of each trial against a key.

    Args:
        trials: the best first, so that the best one is on top.
        key: the horizontal axis.
        metric: the monitored metric.
        mode: `min` or `max`.
    """
    places = {choice: place for place, choice in enumerate(key.choices)}
    points = []
    for trial in trials:
        value = trial.values.get(key.name)
        spread = (trial.number * GOLDEN % 1 - 0.5) / 2
        x = places[value] + spread if isinstance(value, str) and value in places else value
        if isinstance(x, int | float) and math.isfinite(trial.drawn) and math.isfinite(drawable(x)):
            points.append((float(x), trial))

    def draw(axes: Any) -> None:
        for index, (x, trial) in reversed(list(enumerate(points))):
            draw_point(axes, x, trial, index)
        finish(axes, "", [trial.drawn for _, trial in points], mode, whole_x=False)
        axes.set_xlabel(short_label(key.name), color=INK, parse_math=False)
        if key.choices:
            labels = [short_label(choice) for choice in key.choices]
            axes.set_xticks(range(len(labels)), labels, parse_math=False)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        elif key.log and points and min(x for x, _ in points) > 0:
            xs = [x for x, _ in points]
            set_log_axis(axes, max(xs) / min(xs), "x")

    title = f"{metric} by {key.name}"
    return Drawing(title, f"{title}: {count(len(points), 'trial')}", draw, [trial.label for _, trial in points])


def importance_bars(importance: Mapping[str, float]) -> Drawing:
    """Return the importance of each key as a bar, the most important first."""
    shown = sorted(importance.items(), key=lambda pair: -pair[1])[:MAX_BARS]

    def draw(axes: Any) -> None:
        places = range(len(shown))
        axes.barh(places, [share for _, share in shown], color=SERIES[0], height=0.6)
        axes.set_yticks(places, [short_label(key) for key, _ in shown], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        set_style(axes)
        axes.grid(visible=False, axis="y")

    words = ", ".join(f"{key} {100 * share:.0f} %" for key, share in shown)
    return Drawing("importance", f"importance: {words}", draw, size=(4.6, 0.8 + 0.32 * len(shown)))


# --------------------------------------------------------------------------------------- drawing


def draw_steps(axes: Any, steps: Sequence[tuple[float, float]]) -> None:
    """Draw the best value so far as a line with steps."""
    xs, values = [x for x, _ in steps], [value for _, value in steps]
    axes.plot(xs, values, color=INK, linewidth=1.8, drawstyle="steps-post", zorder=3)


def draw_point(axes: Any, x: float, trial: TrialFacts, index: int) -> None:
    """Draw a trial as a marker."""
    draw_marker(axes, x, trial.drawn, style_of(trial.status), 5, index)


def draw_marker(axes: Any, x: float, y: float, style: Style, size: float, index: int | None = None) -> None:
    """Draw the marker of a status."""
    inside = "none" if style.is_hollow else style.color
    (line,) = axes.plot(
        [x], [y], linestyle="", marker=style.marker, markersize=size, color=style.color, markerfacecolor=inside
    )
    if index is not None:
        line.set_gid(f"curve-{index}")


def finish(axes: Any, xlabel: str, values: Sequence[float], mode: str = "", *, whole_x: bool = True) -> None:
    """Set the labels, the scale of the values and the style of axes.

    Args:
        axes: of matplotlib.
        xlabel: what the horizontal axis shows.
        values: that are drawn.
        mode: `min` or `max` leaves out far worse values than the others, and says how many; '' shows all.
        whole_x: whether the horizontal axis has whole numbers.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = usual_range(values, mode)
    finite = [value for value in values if low <= value <= high]
    outside = sum(math.isfinite(value) for value in values) - len(finite)
    if not finite:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=INK)
    elif min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO:
        set_log_axis(axes, max(finite) / min(finite))
    elif outside:
        margin = 0.05 * (max(finite) - min(finite)) or 1.0
        axes.set_ylim(min(finite) - margin, max(finite) + 2 * margin)
    if outside:
        text, place = f"{count(outside, 'worse trial')} outside", {"ha": "right", "va": "bottom", "fontsize": 8}
        axes.text(1, 1, text, transform=axes.transAxes, color=INK, **place)
    axes.set_xlabel(xlabel, color=INK)
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    set_style(axes)


def usual_range(values: Sequence[float], mode: str) -> tuple[float, float]:
    """Return the range of the values without outliers: a trial that diverged would hide how the others differ.

    Args:
        values: any numbers.
        mode: `min` or `max`: values that are far worse than the median are outliers; '': none is.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite or mode not in ("min", "max"):
        return -math.inf, math.inf
    median, best = finite[len(finite) // 2], finite[0] if mode == "min" else finite[-1]
    limit = median + OUTLIER * (median - best)
    if limit == best:  # most values are equal
        return -math.inf, math.inf
    return (-math.inf, limit) if mode == "min" else (limit, math.inf)

"""Learning curves as SVG for a page and as a PNG file. Imports matplotlib only to draw."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trainkit.core.terminal import printable
from trainkit.display.text import WATCHED_PREFIXES, number

SIZE = (4.6, 2.7)  # inches of a chart; 72 SVG units each
LOG_RATIO = 100  # a metric gets a logarithmic axis if its largest value is this many times its smallest
LARGEST = 1e100  # larger values are not drawn: matplotlib cannot scale their axis
MAX_CHARTS = 24
MAX_LEGEND = 3  # curves of a chart whose legend is inside, if other charts have the same curves
NOT_METRICS = {"epoch", "step", "seconds", "samples_per_second", "tokens_per_second", "train/samples", "train/loss_sum"}
SERIES = ("#2a6fdb", "#c2570c", "#15803d", "#8b3fc7", "#c0264b", "#0b7285", "#7a6a00", "#a8327d")  # on white
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))  # colours alone are not enough
INK, LINE, MUTED, PAPER = "#1c2127", "#d4d9df", "#b3bac3", "#fefefe"


@dataclass(frozen=True)
class ChartCurve:
    """The values of a metric over the epochs.

    Attributes:
        name: the name of the curve.
        epochs: the epoch of each value.
        values: the values of the metric; NaN leaves a gap.
        place: the number of its colour. Curves that have no colour of their own are grey.
    """

    name: str
    epochs: Sequence[float]
    values: Sequence[float]
    place: int = 0

    @property
    def is_grey(self) -> bool:
        """Whether there are too many curves for this one to have a colour."""
        return self.place >= len(SERIES)


@dataclass(frozen=True)
class Chart:
    """A chart with one or more curves.

    Attributes:
        title: the title of the chart.
        curves: in the order of their colours.
        best: the epoch and the value of the best monitored value, if the chart shows this metric.
        max_log_ratio: the ratio of the largest to the smallest value above which the axis is logarithmic.
    """

    title: str
    curves: Sequence[ChartCurve]
    best: tuple[float, float] | None = None
    max_log_ratio: float = LOG_RATIO


@dataclass(frozen=True)
class Drawing:
    """A chart of another kind than curves over the epochs.

    Attributes:
        title: the title of the chart.
        description: the chart in words, for readers who do not see it.
        draw: draws it into axes of matplotlib.
        names: what the pointer shows on a line. The line `curve-2` has the name with the index 2.
        size: in inches.
    """

    title: str
    description: str
    draw: Callable[[Any], object]
    names: Sequence[str] = ()
    size: tuple[float, float] = SIZE


# ------------------------------------------------------------------------------------- what to draw


def run_charts(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None = None) -> list[Chart]:
    """Return the charts of a run: losses first, then accuracy, learning rates, and every other metric.

    Args:
        history: the metrics of each epoch.
        best: the entry of the best epoch in `run.json`.
    """
    monitor = best.get("metric") if best else None
    groups: dict[str, list[str]] = {}
    for name in metric_names(history):
        if name not in NOT_METRICS or name == monitor:
            groups.setdefault(_chart_of(name), []).append(name)
    charts = []
    for title in sorted(groups, key=_position):
        names = groups[title]
        mark = (best["epoch"], best["value"]) if best and monitor in names else None
        curves = [_curve(name, name, history, index) for index, name in enumerate(names)]
        charts.append(Chart(title, curves, mark, 9 if title == "learning rate" else LOG_RATIO))
    return charts


def job_charts(jobs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], metrics: Sequence[str]) -> list[Chart]:
    """Return a chart per metric with a curve per job.

    Args:
        jobs: the name and the history of each job, the best first: the best jobs get a colour.
        metrics: the metrics to draw. Those that no job has are skipped.
    """
    charts = []
    for metric in metrics:
        curves = [
            _curve(name, metric, history, index)
            for index, (name, history) in enumerate(jobs)
            if any(metric in row for row in history)
        ]
        if curves:
            charts.append(Chart(metric, curves))
    return charts


def metric_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics with a number in any epoch."""
    return list(dict.fromkeys(name for row in history for name, value in row.items() if _is_number(value)))


def _chart_of(name: str) -> str:
    """Return the title of the chart of a metric. Training and validation share a chart."""
    part, _, rest = name.partition("/")
    if part == "lr":
        return "learning rate"
    if f"{part}/" in WATCHED_PREFIXES:
        return "watched parameters" if part == "param" else "watched gradients"
    return rest if part in ("train", "val") and rest else name


def _position(title: str) -> tuple[int, str]:
    first = ("loss", "accuracy", "learning rate")
    return (first.index(title) if title in first else len(first), title)


def _curve(name: str, metric: str, history: Sequence[Mapping[str, Any]], place: int) -> ChartCurve:
    points = [(row["epoch"], _drawable(row[metric])) for row in history if metric in row]
    return ChartCurve(name, [epoch for epoch, _ in points], [value for _, value in points], place)


def _drawable(value: Any) -> float:
    return float(value) if _is_number(value) and abs(value) <= LARGEST else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def describe(chart: Chart) -> str:
    """Return a chart in words, for readers who do not see it."""
    parts = []
    for curve in chart.curves[: len(SERIES)]:
        finite = [value for value in curve.values if math.isfinite(value)]
        span = f"from {number(finite[0])} to {number(finite[-1])}" if finite else "without a finite value"
        parts.append(f"{curve.name} {span}")
    if len(chart.curves) > len(parts):
        parts.append(f"and {len(chart.curves) - len(parts)} more")
    return f"{chart.title} by epoch: {'; '.join(parts)}"


# ------------------------------------------------------------------------------------------ drawing


def draw_svg(chart: Chart | Drawing, number_in_page: int) -> str:
    """Return a chart as an `<svg>` element for a page with the variables `--ink`, `--line`, `--muted` and `--c1`, ….

    Args:
        chart: the chart.
        number_in_page: makes the ids of the element unique.
    """
    drawing = chart if isinstance(chart, Drawing) else _drawing_of(chart)
    with _matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # its metadata would name addresses
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_page(buffer.getvalue(), drawing, number_in_page)


def _drawing_of(chart: Chart) -> Drawing:
    return Drawing(
        chart.title, describe(chart), lambda axes: _draw(axes, chart), [curve.name for curve in chart.curves]
    )


def draw_png(charts: Sequence[Chart]) -> bytes:
    """Return the charts as one picture on white."""
    shown = charts[:MAX_CHARTS]
    with _matplotlib():
        from matplotlib.figure import Figure

        across = 1 if len(shown) == 1 else 2
        down = max(1, math.ceil(len(shown) / across))
        figure = Figure(figsize=(SIZE[0] * across, (SIZE[1] + 0.3) * down), layout="constrained", facecolor="white")
        places = figure.subplots(down, across, squeeze=False).ravel()
        legend = _shared_legend(shown)
        drawn = []
        for axes, chart in zip(places, shown, strict=False):
            lines = _draw(axes, chart)
            drawn.append(lines)
            axes.set_title(short_label(chart.title), fontsize=11, loc="left", color=INK, parse_math=False)
            if legend is None:
                _add_legend(axes, lines, chart)
        if legend is not None:
            _add_legend(figure, drawn[legend], shown[legend], loc="outside lower left", ncols=2)
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


@contextlib.contextmanager
def _matplotlib() -> Iterator[None]:
    """Import matplotlib with its own defaults, whatever a user's settings say. Silence its notes about fonts."""
    os.environ.pop("MPLBACKEND", None)  # a notebook sets a backend that may not be installed; a file needs none
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import matplotlib as mpl

        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trainkit", "font.size": 10})
            yield


def _draw(axes: Any, chart: Chart) -> list[Any]:
    """Draw a chart; return the line of each curve."""
    from matplotlib.ticker import MaxNLocator

    lines: list[Any] = []
    for index, curve in reversed(list(enumerate(chart.curves))):  # the first one last, so that it is on top
        dashes = () if curve.is_grey else DASHES[curve.place % len(DASHES)]
        color, width = (MUTED, 0.8) if curve.is_grey else (SERIES[curve.place], 1.8)
        marker = "o" if len(curve.values) == 1 else None
        line = axes.plot(curve.epochs, curve.values, color=color, linewidth=width, marker=marker, markersize=5)[0]
        line.set_gid(f"curve-{index}")
        if dashes:
            line.set_dashes(dashes)
        lines.insert(0, line)
    finite = [value for curve in chart.curves for value in curve.values if math.isfinite(value)]
    if not finite:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=INK)
    elif min(finite) > 0 and max(finite) / min(finite) > chart.max_log_ratio:
        set_log_axis(axes, max(finite) / min(finite))
    if chart.best and all(math.isfinite(value) and abs(value) <= LARGEST for value in chart.best):
        axes.plot(*chart.best, marker="o", linestyle="", markersize=7, markerfacecolor="none", markeredgecolor=INK)
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    set_style(axes)
    return lines


def set_style(axes: Any) -> None:
    """Give axes the style of all charts."""
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both", length=0)
    for spine in axes.spines.values():
        spine.set_edgecolor(LINE)
    axes.spines[["top", "right"]].set_visible(False)


def _shared_legend(charts: Sequence[Chart]) -> int | None:
    """Return the place of the chart whose legend is that of all charts; None if each chart has its own."""
    names = [{curve.name for curve in chart.curves} for chart in charts]
    largest = max(range(len(names)), key=lambda place: len(names[place]), default=0)
    is_shared = names and len(names[largest]) > MAX_LEGEND and all(found <= names[largest] for found in names)
    return largest if is_shared else None


def _add_legend(place: Any, lines: Sequence[Any], chart: Chart, **options: Any) -> None:
    """Add the legend of a chart to its axes or to the whole figure."""
    named = [line for line, curve in zip(lines, chart.curves, strict=True) if not curve.is_grey]
    names = [short_label(curve.name) for curve in chart.curves if not curve.is_grey]
    for text in place.legend(named, names, frameon=False, fontsize=8, **options).get_texts():
        text.set_parse_math(False)


def set_log_axis(axes: Any, ratio: float, name: str = "y") -> None:
    """Make an axis logarithmic, with plain numbers: matplotlib's own powers of ten need a font for formulas.

    Args:
        axes: the axes of matplotlib.
        ratio: the ratio of the largest to the smallest value.
        name: `x` or `y`.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 100 else (1.0,), numticks=7))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def short_label(name: str) -> str:
    """Return a name for a picture: short, and no name begins with `_`, which matplotlib would leave out."""
    shown = printable(name).encode(errors="replace").decode()
    return f" {shown if len(shown) <= 48 else shown[:47] + '…'}"


def _for_page(svg: str, drawing: Drawing, number_in_page: int) -> str:
    """Return an SVG file as an element of a page: unique ids, variables instead of colours, and a description."""
    svg = re.sub(r"<style.*?</style>|font-family: [^;\"]*; ?", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    names = [escape(printable(name)) for name in drawing.names]
    svg = re.sub(r'<g id="curve-(\d+)">', lambda m: f"<g><title>{names[int(m[1])]}</title>", svg)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="f{number_in_page}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>f{number_in_page}-", svg)
    variables = {
        INK: "ink",
        LINE: "line",
        MUTED: "muted",
        PAPER: "paper",
        **{c: f"c{i}" for i, c in enumerate(SERIES, 1)},
    }
    svg = re.sub("|".join(variables), lambda m: f"var(--{variables[m[0]]})", svg)
    start = svg.index(">") + 1
    view = re.search(r'viewBox="[^"]*"', svg[:start])
    text = escape(printable(drawing.description))
    opening = f'<svg class="chart" role="img" aria-label="{text}" {view[0] if view else ""}>'
    return f"{opening}\n<title>{text}</title>{svg[start:].replace('xlink:href', 'href').strip()}"

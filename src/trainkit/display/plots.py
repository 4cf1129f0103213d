"""Plots. Nothing here imports torch."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.core.terminal import printable

LEGEND_WIDTH = 90  # characters
LOG_Y_RATIO = 100.0  # positive values that span more than this ratio get a log axis


@dataclass(frozen=True)
class Curve:
    """A curve with a band.

    Attributes:
        label: for the legend.
        x: the horizontal positions, ascending.
        mean: the curve. NaN makes a gap.
        std: half the width of the band; 0 for no band.
    """

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    std: Sequence[float]


def plot_curves(
    path: Path,
    curves: Sequence[Curve],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    points: bool = False,
) -> None:
    """Plot curves, each with a band of one standard deviation.

    The vertical axis is logarithmic if the values are positive and span more than `LOG_Y_RATIO`.

    Args:
        path: the PNG or SVG file to write.
        curves: at least one.
        xlabel: what the horizontal axis shows.
        ylabel: what the vertical axis shows.
        log_x: make the horizontal axis logarithmic.
        points: mark each value.
    """
    labels = [_legend_text(curve.label) for curve in curves]
    legend_columns = max(1, min(len(labels), LEGEND_WIDTH // (max(map(len, labels)) + 6)))
    figure, axes = new_figure(4.5 + 0.2 * math.ceil(len(labels) / legend_columns))
    for curve, label in zip(curves, labels, strict=True):
        marker = "o" if points or len(curve.x) == 1 else None
        (line,) = axes.plot(curve.x, curve.mean, marker=marker, markersize=4, label=label)
        if any(curve.std):
            low = [mean - std for mean, std in zip(curve.mean, curve.std, strict=True)]
            high = [mean + std for mean, std in zip(curve.mean, curve.std, strict=True)]
            axes.fill_between(curve.x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    values = [value for curve in curves for value in curve.mean if abs(value) < float("inf")]
    if values and min(values) > 0 and max(values) / min(values) > LOG_Y_RATIO:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for curve in curves for x in curve.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=printable(xlabel), ylabel=printable(ylabel))
    legend = figure.legend(loc="outside lower left", ncols=legend_columns, frameon=False, fontsize="small")
    for text in (axes.xaxis.label, axes.yaxis.label, *legend.get_texts()):
        text.set_parse_math(False)  # a name may contain $
    axes.grid(alpha=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the characters of a name
        figure.savefig(path, dpi=150)


def _legend_text(label: str) -> str:
    """Return a label that fits into the legend. matplotlib leaves out labels that begin with an underscore."""
    text = printable(label)
    text = text if len(text) <= LEGEND_WIDTH else f"{text[: LEGEND_WIDTH - 1]}…"
    return f" {text}" if text.startswith("_") else text


def new_figure(height: float = 4.5, width: float = 7) -> tuple[Any, Any]:
    """Return a figure of a size in inches that needs no window, and its axes."""
    os.environ.pop("MPLBACKEND", None)  # a notebook sets a backend that may not be installed; a file needs none
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot_lr_curve(path: Path, result: Mapping[str, Any]) -> None:
    """Plot the losses of a learning-rate range test against the learning rate, and mark the suggestion.

    Args:
        path: the PNG file to write.
        result: what `RangeTest.result` returns.
    """
    rates, smoothed, suggestion = result["rates"], result["smoothed"], result["suggestion"]
    figure, axes = new_figure()
    axes.plot(rates, result["losses"], color="0.75", linewidth=1, label="loss of each step")
    axes.plot(rates, smoothed, color="C0", label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color="C3", linestyle="--", label=f"steepest descent: lr={suggestion:.2g}")
    low, high = min(smoothed), max(smoothed[0], *smoothed[: len(smoothed) // 2 + 1])
    margin = 0.15 * (high - low) or 1.0
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(low - margin, high + margin))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)

"""Plots. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_lr_curve(path: Path, result: Mapping[str, Any]) -> None:
    """Plot the losses of a learning-rate range test against the learning rate, and mark the suggestion.

    Args:
        path: the PNG file to write.
        result: what `RangeTest.result` returns.
    """
    rates, smoothed, suggestion = result["rates"], result["smoothed"], result["suggestion"]
    os.environ.pop("MPLBACKEND", None)  # a notebook sets a backend that may not be installed; a file needs none
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
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

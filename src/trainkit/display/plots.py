"""Pictures out of numbers; never needs torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lr_curve(path: Path, found: Mapping[str, Any]) -> None:
    """Draw the losses of a learning-rate range test over the rates, and mark the suggestion."""
    rates, smoothed, suggestion = found["rates"], found["smoothed"], found["suggestion"]
    os.environ.pop("MPLBACKEND", None)  # a notebook's: a picture in a file needs none, and it may not be installed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, found["losses"], color="0.75", linewidth=1, label="loss of each step")
    axes.plot(rates, smoothed, color="C0", label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color="C3", linestyle="--", label=f"steepest fall: lr={suggestion:.2g}")
    low, high = min(smoothed), max(smoothed[0], *smoothed[: len(smoothed) // 2 + 1])
    margin = 0.15 * (high - low) or 1.0
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(low - margin, high + margin))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)

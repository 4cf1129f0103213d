"""What a person sees: the live display, tables and plots. Nothing here imports torch."""

from trainkit.display.live import (
    SHOWN,
    Reading,
    Unbreakable,
    count,
    duration,
    epoch_line,
    finished,
    make,
    nonfinite_line,
    number,
    opening,
    result,
    sparkline,
    split_line,
)

__all__ = [
    "SHOWN",
    "Reading",
    "Unbreakable",
    "count",
    "duration",
    "epoch_line",
    "finished",
    "make",
    "nonfinite_line",
    "number",
    "opening",
    "result",
    "sparkline",
    "split_line",
]

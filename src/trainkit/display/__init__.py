"""What a person sees: the live display, tables and plots. Nothing here imports torch."""

from trainkit.display.live import (
    SHOWN_METRICS,
    ReadingProgress,
    SafeDisplay,
    count,
    duration,
    epoch_line,
    finished,
    make_display,
    nonfinite_line,
    number,
    opening,
    result,
    sparkline,
    split_line,
)

__all__ = [
    "SHOWN_METRICS",
    "ReadingProgress",
    "SafeDisplay",
    "count",
    "duration",
    "epoch_line",
    "finished",
    "make_display",
    "nonfinite_line",
    "number",
    "opening",
    "result",
    "sparkline",
    "split_line",
]

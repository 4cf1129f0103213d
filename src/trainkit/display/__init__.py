"""What a user sees: live displays, formatted text and plots. Nothing here imports torch."""

from trainkit.display.live import ReadingProgress, SafeDisplay, make_display
from trainkit.display.text import (
    SHOWN_METRICS,
    columns,
    count,
    duration,
    epoch_line,
    nonfinite_line,
    number,
    oom_line,
    param_group_table,
    sparkline,
)

__all__ = [
    "SHOWN_METRICS",
    "ReadingProgress",
    "SafeDisplay",
    "columns",
    "count",
    "duration",
    "epoch_line",
    "make_display",
    "nonfinite_line",
    "number",
    "oom_line",
    "param_group_table",
    "sparkline",
]

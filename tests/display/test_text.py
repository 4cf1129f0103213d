"""Formatted text: numbers, durations, sparklines and the line of an epoch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from trainkit.display.text import duration, epoch_line, number, sparkline


def test_a_sparkline_scales_finite_values_from_lowest_to_highest() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([math.nan, 1.0]) == "▁"
    assert len(sparkline([float(i) for i in range(100)])) == 40


def test_durations_use_seconds_minutes_or_hours() -> None:
    assert [duration(s) for s in (0.04, 12.34, 75, 3725)] == ["0.0 s", "12.3 s", "1 min 15 s", "1 h 02 min"]


def test_numbers_have_four_decimals_or_scientific_notation() -> None:
    assert [number(v) for v in (0.0, 1.5, 2e-5, 3e9)] == ["0.0000", "1.5000", "2.00e-05", "3.00e+09"]
    assert number(math.nan) == "nan"


def test_an_epoch_line_shows_losses_watched_values_and_speed() -> None:
    metrics: dict[str, Any] = {"epoch": 3, "train/loss": 0.5, "train/samples": 9, "param/w": 2.0, "grad/w": None}
    metrics |= {"val/f1": 0.25, "val/matrix": [[1, 2]], "hook/value": 7.0}
    empty, own = SimpleNamespace(part="train", metrics={}), SimpleNamespace(part="val", metrics={"f1": 0, "matrix": 0})
    objects = SimpleNamespace(train_metrics=empty, val_metrics=own)
    state: Any = SimpleNamespace(epochs=20, settings=SimpleNamespace(steps=None, monitor="train/loss"), objects=objects)
    line = epoch_line(state, metrics | {"seconds": 1.0, "samples_per_second": 1234.5})
    assert line == "epoch  3/20  train/loss 0.5000  val/f1 0.2500  param/w 2.0000  1,234 samples/s  1.0 s"

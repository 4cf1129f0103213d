"""The plots of a comparison: numpy on the histories is the reference for curves and bands."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.sweeps.made_runs import make_run
from trainkit.core.errors import ConfigError
from trainkit.display.plots import Curve, plot_curves
from trainkit.sweeps.collect import collect
from trainkit.sweeps.comparison import compare, find_axis
from trainkit.sweeps.plot_data import axis_curves, is_logarithmic, learning_curve, plot


def test_a_learning_curve_is_mean_and_deviation_of_each_epoch(tmp_path: Path) -> None:
    histories = [make_run(tmp_path / str(seed), f"seed={seed}") for seed in range(3)]
    (row,) = compare(collect([tmp_path])).rows
    curve = learning_curve(row, "val/loss")
    values = np.array([[epoch["val/loss"] for epoch in history] for history in histories])
    assert curve.x == [1, 2, 3]
    np.testing.assert_allclose(curve.mean, values.mean(0))
    np.testing.assert_allclose(curve.std, values.std(0, ddof=1))
    assert curve.label == "all runs (n=3)"


def test_a_run_that_stopped_early_counts_in_its_epochs(tmp_path: Path) -> None:
    long = make_run(tmp_path / "0", "seed=0")
    short = make_run(tmp_path / "1", "seed=1", history=long[:1])
    (row,) = compare(collect([tmp_path])).rows
    curve = learning_curve(row, "val/loss")
    assert curve.mean == [short[0]["val/loss"], *(epoch["val/loss"] for epoch in long[1:])]


def test_an_axis_curve_is_the_best_metric_against_the_axis_for_each_other_axis(tmp_path: Path) -> None:
    for number, (optim, lr) in enumerate((o, lr) for o in ("sgd", "adam") for lr in (0.1, 0.001, 0.01)):
        make_run(tmp_path / str(number), f"optim={optim}", f"lr={lr}")
    collection = collect([tmp_path])
    axis, other = find_axis(collection, "lr"), find_axis(collection, "optim")
    curves = axis_curves(compare(collection).rows, "val/loss", axis, [other])
    assert sorted(curve.label for curve in curves) == ["optim=adam", "optim=sgd"]
    values = {(run.choices["optim"], run.config["lr"]): run.metrics["val/loss"] for run in collection.runs}
    for curve in curves:
        assert curve.x == [0.001, 0.01, 0.1]
        assert curve.mean == [values[curve.label.removeprefix("optim="), x] for x in curve.x]


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ({0.001, 0.01, 0.1}, True),
        ({1, 2, 4}, True),
        ({32, 64, 128}, True),
        ({0.001, 0.003, 0.01, 0.03}, True),
        ({0.01, 0.1}, True),
        ({1, 2}, False),
        ({1, 2, 3}, False),
        ({float(number) for number in range(1, 21)}, False),
        ({0.0, 0.1, 1.0}, False),
        ({-1.0, 1.0, 100.0}, False),
        ({5.0}, False),
        (set(), False),
    ],
)
def test_values_are_logarithmic_by_a_constant_ratio_or_a_wide_range(values: set[float], logarithmic: bool) -> None:
    assert is_logarithmic(values) is logarithmic


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
@pytest.mark.parametrize("x", [None, "lr"])
def test_a_plot_is_written_in_the_format_of_its_name(name: str, magic: bytes, x: str | None, tmp_path: Path) -> None:
    for number, lr in enumerate((0.1, 0.01)):
        make_run(tmp_path / "runs" / str(number), f"lr={lr}")
    assert plot(collect([tmp_path / "runs"]), tmp_path / name, x=x) == []
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_hostile_names_and_values_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    label = "_$\\frac{ \x1b[31m 学 <b>&"
    curves = [Curve(label, [1, 2], [math.nan, math.inf], [0, math.nan]), Curve("b", [1], [1e300], [0])]
    plot_curves(tmp_path / "a.svg", curves, xlabel="$x", ylabel=label)
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_more_curves_than_colours_are_left_out_with_a_note(tmp_path: Path) -> None:
    for number in range(12):
        make_run(tmp_path / str(number), f"lr={number}")
    notes = plot(collect([tmp_path]), tmp_path / "a.svg")
    assert notes == ["the plot shows the first 10 curves and leaves out 2 curves"]


def test_what_cannot_be_plotted_is_an_error(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "optim=sgd")
    make_run(tmp_path / "1", "optim=adam")
    with pytest.raises(ConfigError, match="is not a number"):
        plot(collect([tmp_path]), tmp_path / "a.svg", x="optim")
    make_run(tmp_path / "failed" / "0", status="failed")
    with pytest.raises(ConfigError, match="no run is completed"):
        plot(collect([tmp_path / "failed"]), tmp_path / "a.svg")

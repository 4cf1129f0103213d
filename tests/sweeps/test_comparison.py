"""The comparison: numpy on the histories is the reference for means and deviations."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Command
from tests.helpers import read_history
from tests.sweeps.made_runs import OPTIM, make_run, random_history
from trainkit.core.errors import ConfigError
from trainkit.sweeps.collect import collect
from trainkit.sweeps.comparison import Table, compare, comparison_lines
from trainkit.sweeps.table import statistic

METRICS = ("train/loss", "val/loss", "val/accuracy")
MODULE = """
class Score:
    def __init__(self, value):
        self.value = value

    def on_epoch(self, state, metrics):
        metrics["mine/score"] = self.value
"""


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_run_by_a_hooks_metric_is_first_and_its_value_is_shown(
    mode: str, tmp_path: Path, forked: Command
) -> None:
    (tmp_path / "scores.py").write_text(MODULE)
    result = forked(
        "-m", "+hooks.s={_target_: scores.Score, value: 0}", "hooks.s.value=0.25,0.75,0.5", "model=mlp", "epochs=1",
        "limit_batches=1", "monitor.metric=mine/score", f"monitor.mode={mode}", "progress=off",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    header, *rows = [line for line in result.stdout.splitlines() if line]
    assert "mine/score" in header
    shown = [float(value) for row in rows for value in row.split() if value in ("0.2500", "0.5000", "0.7500")]
    assert shown == sorted([0.25, 0.5, 0.75], reverse=mode == "max")


def made_sweep(folder: Path) -> None:
    """Make the runs of 3 optimizers x 2 learning rates x 3 seeds."""
    for number, (optim, lr, seed) in enumerate(itertools.product(OPTIM, (0.1, 0.01), range(3))):
        make_run(folder / str(number), f"optim={optim}", f"lr={lr}", f"seed={seed}")


def assert_equals_numpy(table: Table, folder: Path) -> None:
    """Check all rows of a sweep over optimizer, learning rate and seed against the histories on the disk."""
    best: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in folder.iterdir():
        if run.is_dir():
            words = dict(line[2:].split("=") for line in (run / ".hydra/overrides.yaml").read_text().splitlines())
            epochs = read_history(run)
            best.setdefault((words["optim"], words["lr"]), []).append(min(epochs, key=lambda row: row["val/loss"]))
    assert len(table.rows) == len(best) == 6
    for row in table.rows:
        epochs = best.pop((row.values["optim"], str(row.values["lr"])))
        assert row.count == len(epochs) == 3
        assert row.seeds == [0, 1, 2]
        for metric in METRICS:
            values = np.array([epoch[metric] for epoch in epochs])
            found = row.metrics[metric]
            assert found.count == 3
            assert found.mean == pytest.approx(values.mean(), rel=1e-14)
            assert found.std == pytest.approx(values.std(ddof=1), rel=1e-12)
    means = [row.metrics["val/loss"].mean for row in table.rows]
    assert means == sorted(means)


def test_six_rows_of_three_seeds_equal_numpy_on_the_histories(tmp_path: Path) -> None:
    made_sweep(tmp_path)
    assert_equals_numpy(compare(collect([tmp_path])), tmp_path)


@pytest.mark.slow
def test_the_rows_of_a_trained_sweep_equal_numpy_on_the_histories(tmp_path: Path, forked: Command) -> None:
    sweep = ["optim=sgd,adam,adadelta", "lr=0.1,0.01", "seed=0,1,2"]
    small = ["model=mlp", "model.hidden=[4]", "epochs=2", "limit_batches=1", "progress=off"]
    result = forked("-m", *sweep, *small, "hydra.sweep.dir=sweep")
    assert result.returncode == 0, result.stderr
    table = compare(collect([tmp_path / "sweep"]))
    assert [axis.name for axis in table.axes] == ["optim", "lr"]
    assert_equals_numpy(table, tmp_path / "sweep")
    assert len([line for line in result.stdout.splitlines() if "±" in line]) == 6


@pytest.mark.parametrize(
    "values", [[1e308, 1e308], [1e308, -1e308], [math.inf, 1.0], [math.nan, 1.0], [2.0], [1, 2, 4], [1e-320, 3e-320]]
)
def test_statistics_of_extreme_values_equal_numpy(values: list[float]) -> None:
    found = statistic(values)
    with np.errstate(all="ignore"):
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    wide = np.array(values, dtype=np.longdouble)  # the sum of float64 overflows
    assert found.mean == pytest.approx(float(wide.mean()), nan_ok=True)
    assert found.std == pytest.approx(deviation, nan_ok=True, rel=1e-12, abs=1e-300)


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    make_run(tmp_path)
    (row,) = compare(collect([tmp_path])).rows
    assert row.count == 1
    assert math.isnan(row.metrics["val/loss"].std)
    assert "±" not in "\n".join(comparison_lines(tmp_path))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_row_with_nan_is_last_and_named_in_every_order(mode: str, tmp_path: Path) -> None:
    lost: list[dict[str, Any]] = [{"epoch": 1, "train/loss": math.nan, "val/loss": math.nan, "val/accuracy": 0.1}]
    for number, lr in enumerate((0.1, 0.2, 0.3)):
        more: dict[str, Any] = {"history": lost} if lr == 0.2 else {}
        make_run(tmp_path / str(number), f"lr={lr}", "seed=0", f"monitor.mode={mode}", **more)
        make_run(tmp_path / str(number + 3), f"lr={lr}", "seed=1", f"monitor.mode={mode}")
    collection = collect([tmp_path])
    for sort, reverse in itertools.product((None, "val/loss", "-val/loss"), (False, True)):
        table = compare(collection, sort=sort, reverse=reverse)
        last = table.rows[-1]
        assert last.values["lr"] == 0.2
        assert last.count == 2
        assert math.isnan(last.metrics["val/loss"].mean)
        assert table.notes == [f"no epoch has a finite val/loss: {tmp_path / '1'}"]
        values = [row.metrics["val/loss"].mean for row in table.rows[:-1]]
        descending = (mode == "max" if sort is None else sort.startswith("-")) != reverse
        assert values == sorted(values, reverse=descending)


def test_sort_takes_axes_short_names_and_counts(tmp_path: Path) -> None:
    made_sweep(tmp_path)
    make_run(tmp_path / "18", "optim=sgd", "lr=0.1", "seed=3")
    collection = collect([tmp_path])
    assert [row.values["lr"] for row in compare(collection, sort="lr").rows] == [0.01] * 3 + [0.1] * 3
    assert [row.values["optim"] for row in compare(collection, sort="-optim").rows][::2] == ["sgd", "adam", "adadelta"]
    assert [row.count for row in compare(collection, sort="-n").rows] == [4, 3, 3, 3, 3, 3]
    accuracies = [row.metrics["val/accuracy"].mean for row in compare(collection, sort="accuracy").rows]
    assert accuracies == sorted(accuracies)
    means = [row.metrics["val/loss"].mean for row in compare(collection, sort="lr").rows]
    assert means[:3] == sorted(means[:3])  # equal values stay in the order of the monitored metric


@pytest.mark.parametrize(
    ("sort", "hint"), [("accurcy", "did you mean val/accuracy?"), ("loss", "train/loss, val/loss")]
)
def test_a_wrong_sort_key_is_an_error_with_a_hint(sort: str, hint: str, tmp_path: Path) -> None:
    made_sweep(tmp_path)
    with pytest.raises(ConfigError, match="--sort") as caught:
        compare(collect([tmp_path]), sort=sort)
    assert hint in str(caught.value)


def test_top_keeps_the_best_rows_and_counts_the_hidden_ones(tmp_path: Path) -> None:
    made_sweep(tmp_path)
    collection = collect([tmp_path])
    table = compare(collection, top=2)
    assert [row.values for row in table.rows] == [row.values for row in compare(collection).rows[:2]]
    assert table.hidden == 4


@pytest.mark.parametrize(
    ("group_by", "rows"),
    [(["optim"], 3), (["lr"], 2), (["optim", "lr"], 6), (["optim", "lr", "seed"], 18), (["weight_decay"], 1), ([], 1)],
)
def test_group_by_folds_all_other_axes(group_by: list[str], rows: int, tmp_path: Path) -> None:
    made_sweep(tmp_path)
    table = compare(collect([tmp_path]), group_by=group_by)
    assert len(table.rows) == rows
    assert [row.count for row in table.rows] == [18 // rows] * rows
    assert [axis.name for axis in table.axes] == group_by


def test_a_wrong_group_key_is_an_error_with_the_nearest_key(tmp_path: Path) -> None:
    made_sweep(tmp_path)
    collection = collect([tmp_path])
    with pytest.raises(ConfigError, match=r"did you mean optim\?"):
        compare(collection, group_by=["optm"])
    with pytest.raises(ConfigError, match=r"choose from: .*model\._target_"):
        compare(collection, group_by=["_target_"])


def test_runs_with_different_monitors_are_named_and_sorted_by_the_first(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "lr=0.1")
    make_run(tmp_path / "1", "lr=0.2", "monitor.metric=val/accuracy", "monitor.mode=max")
    make_run(tmp_path / "2", "lr=0.3")
    table = compare(collect([tmp_path]))
    assert (table.metric, table.mode) == ("val/loss", "min")
    assert "val/loss (2 runs), val/accuracy (1 run)" in table.notes[0]
    values = [row.metrics["val/loss"].mean for row in table.rows]
    assert values == sorted(values)


def test_runs_with_different_losses_are_named_unless_another_metric_is_monitored(tmp_path: Path) -> None:
    other = "loss._target_=torch.nn.MultiMarginLoss"
    make_run(tmp_path / "losses/0", "loss._target_=torch.nn.CrossEntropyLoss", "lr=0.1")
    make_run(tmp_path / "losses/1", other, "lr=0.2")
    assert compare(collect([tmp_path / "losses"])).notes == [
        "the runs have different losses, whose values do not compare: CrossEntropyLoss, MultiMarginLoss"
    ]
    accuracy = ["monitor.metric=val/accuracy", "monitor.mode=max"]
    make_run(tmp_path / "metric/0", "loss._target_=torch.nn.CrossEntropyLoss", *accuracy, "lr=0.1")
    make_run(tmp_path / "metric/1", other, *accuracy, "lr=0.2")
    assert compare(collect([tmp_path / "metric"])).notes == []


def test_runs_that_are_not_completed_are_in_no_row_and_are_listed(tmp_path: Path) -> None:
    for number, status in enumerate(("completed", "failed", "stopped")):
        make_run(tmp_path / str(number), f"lr={number}", status=status)
    table = compare(collect([tmp_path]))
    assert [row.values["lr"] for row in table.rows] == [0]
    assert [run.status for run in table.others] == ["failed", "stopped"]


def test_runs_with_the_same_seed_are_counted_in_a_note(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "seed=0")
    make_run(tmp_path / "1", "seed=0", "progress=rich")
    make_run(tmp_path / "2", "seed=1")
    table = compare(collect([tmp_path]))
    assert [row.count for row in table.rows] == [3]
    assert table.notes == ["runs with the same seed as another run in their row: 1"]


def test_metrics_that_only_some_runs_have_count_these_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "seed=0")
    extra = [{**row, "val/f1": 0.5} for row in random_history("x")]
    make_run(tmp_path / "1", "seed=1", history=extra)
    (row,) = compare(collect([tmp_path])).rows
    assert (row.metrics["val/f1"].count, row.metrics["val/loss"].count) == (1, 2)


@pytest.mark.parametrize("best", [{"metric": "val/loss", "value": 1, "epoch": 1, "val/x": [1], "val/y": "z"}, None])
def test_odd_entries_of_the_best_epoch_are_no_metrics(best: Any, tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best": best}))
    (row,) = compare(collect([tmp_path])).rows
    assert list(row.metrics) == ["val/loss"]


def test_a_folder_without_completed_runs_has_no_table(tmp_path: Path) -> None:
    assert comparison_lines(tmp_path) == []
    make_run(tmp_path / "0", status="failed")
    assert comparison_lines(tmp_path) == []

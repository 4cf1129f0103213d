"""The benchmarks run, and the loops that they compare have the same losses. Speed is not tested."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def table_rows(module: str, *argv: str) -> list[list[str]]:
    """Return the cells of the table that a benchmark prints, without its head."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_all_loops_have_the_losses_of_the_tutorial() -> None:
    rows = table_rows("loop", "--samples", "150", "--epochs", "3", "--batch-sizes", "32")
    assert len(rows) == 7
    for _, name, _, _, difference in rows:
        assert float(difference) < (1e-4 if "bf16" not in name else 1e-2), name


def test_the_start_of_runs_and_the_decoding_of_images_are_timed() -> None:
    names = [row[0] for row in table_rows("startup", "--repeats", "1", "--images", "40")]
    assert any("40 images decoded before" in name for name in names)
    assert "a plain loop over PIL" in names


def test_all_models_have_the_losses_of_the_tutorial_and_peers_that_are_not_installed_are_skipped() -> None:
    rows = table_rows("peers", "--epochs", "2", "--scale", "0.01")
    assert {row[0] for row in rows} == {"toy_cnn", "resnet18", "char_gpt"}
    for model, name, *_, difference in rows:
        if name == "trainkit":
            assert float(difference) < (0.05 if model == "resnet18" else 1e-4), model  # batch norm amplifies rounding


def test_two_ranks_have_the_losses_of_one_process() -> None:
    rows = table_rows("ranks", "--jobs", "tiny", "--epochs", "1")
    assert [row[1] for row in rows].count("2 ranks, 1 thread each") == 2
    assert all(float(difference) < 1e-5 for *_, difference in rows)


def test_memory_grows_by_the_size_of_the_images() -> None:
    small, large = table_rows("scaling", "--sizes", "1000", "60000", "--steps", "3", "--rounds", "2")
    memory, images = (float(large[column].replace(",", "")) for column in (4, 5))
    assert images - 2 < memory < 1.1 * images + 30
    assert small[4] == small[5] == "0"


def test_reading_by_hand_and_with_trainkit_gives_the_same_losses() -> None:
    rows = table_rows("reading", "--samples", "200", "--epochs", "2", "--kinds", "mappings", "streamed")
    assert len(rows) == 8
    assert all(float(difference) < 1e-4 for *_, difference in rows)


def test_the_comparison_of_runs_is_timed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.comparison", "10"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("trainkit compare runs: 10 runs in ")
    assert second.startswith("trainkit compare runs --json: 10 runs in ")


def test_searches_are_compared_by_the_known_losses_of_their_trials(tmp_path: Path) -> None:
    sizes = ["--searches", "1", "--trainings", "2", "--pruned", "branin", "--trials", "2"]
    rows = table_rows("search", "--tasks", "branin", *sizes, "--folder", str(tmp_path))
    methods, pruners = rows[:3], rows[5:]  # between them is the head of the second table
    assert [name for _, name, *_ in pruners] == ["off", "median", "hyperband", "asha"]
    shown = {f"branin-{name.lower().replace(', ', '-')}-18-0": row for _, name, *row in methods}
    shown |= {f"branin-tpe-{name}-2-0": row for _, name, *row in pruners}
    for sweep, row in shown.items():
        losses = [loss for run in tmp_path.glob(f"{sweep}/*/history.jsonl") for loss in branin_losses(run.parent)]
        is_of_pruners = sweep.endswith("-2-0")
        assert float(row[0 if is_of_pruners else 1].split()[0]) == pytest.approx(min(losses), rel=1e-3), sweep
        assert len(losses) == (int(row[1].split()[0]) if is_of_pruners else 18), sweep


def branin_losses(run: Path) -> list[float]:
    """Return the validation loss of each epoch by the formula, and compare it with the history of the run."""
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    fraction = (math.log10(config.lr) + 4) / 4
    x, y = 15 * fraction - 5, 15 * config.model.place
    a, b, c, r, s, t = 1, 5.1 / (4 * math.pi**2), 5 / math.pi, 6, 10, 1 / (8 * math.pi)
    branin = a * (y - b * x**2 + c * x - r) ** 2 + s * (1 - t) * math.cos(x) + s
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [1 + math.log10(1 + branin - 0.397887) + 2 * math.exp(-(0.2 + fraction) * row["epoch"]) for row in rows]
    assert [row["val/loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    return losses

"""The benchmarks run, and the loops that they compare have the same losses. Speed is not tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_startup_is_compared_with_importing_torch() -> None:
    assert table_rows("startup", "--repeats", "1")[0][0] == 'python -c "import torch"'


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

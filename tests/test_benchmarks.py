"""The benchmarks run, and what they race trains the same; how fast is told by them, not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def rows(module: str, *argv: str) -> list[list[str]]:
    """The cells of the table that a benchmark prints, its head left out."""
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


def test_every_loop_of_the_race_has_the_losses_of_the_tutorial() -> None:
    raced = rows("loop", "--samples", "150", "--epochs", "3", "--batch-sizes", "32")
    assert len(raced) == 7
    for _, name, _, _, off in raced:
        assert float(off) < (1e-4 if "bf16" not in name else 1e-2), name


def test_start_up_is_compared_with_torch_alone() -> None:
    assert rows("startup", "--repeats", "1")[0][0] == 'python -c "import torch"'


def test_memory_grows_by_the_images_and_little_else() -> None:
    small, large = rows("scaling", "--sizes", "1000", "60000", "--steps", "3", "--rounds", "2")
    more, images = (float(large[column].replace(",", "")) for column in (4, 5))
    assert images - 2 < more < 1.1 * images + 30
    assert small[4] == small[5] == "0"


def test_data_sets_read_by_hand_and_by_trainkit_give_the_same_losses() -> None:
    raced = rows("reading", "--samples", "200", "--epochs", "2", "--kinds", "mappings", "streamed")
    assert len(raced) == 8
    assert all(float(off) < 1e-4 for *_, off in raced)

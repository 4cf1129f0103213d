"""The commands of each example work in a copy of its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SCRIPT
from tests.helpers import read_history

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A copy of the examples, without the outputs of earlier runs."""
    return shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("outputs", "*.pt"))


def run_command(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder; return its stdout. Its exit code must be 0."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_custom_model_learns_the_custom_data_set(copies: Path) -> None:
    folder = copies / "own_model_and_data"
    run_command(folder, SCRIPT, "experiment=spirals", "epochs=5", "device=cpu")
    history = read_history(folder / "outputs" / "latest")
    assert len(history) == 5
    assert history[-1]["val/accuracy"] > 0.7  # one of three classes; random guesses reach 0.33


def test_fine_tuning_starts_from_the_pretrained_backbone_and_keeps_its_stem(copies: Path) -> None:
    import torch

    folder = copies / "fine_tuning"
    run_command(folder, SCRIPT, "experiment=pretrain", "hydra.run.dir=outputs/pretrain", "epochs=3", "device=cpu")
    run_command(folder, sys.executable, "save_backbone.py", "outputs/pretrain", "backbone.pt")
    run_command(folder, SCRIPT, "experiment=fine_tune", "hydra.run.dir=outputs/fine_tune", "epochs=2", "device=cpu")

    before = torch.load(folder / "backbone.pt", weights_only=True)
    checkpoints = folder / "outputs" / "fine_tune" / "checkpoints"
    best = checkpoints / (checkpoints / "best").read_text().strip() / "state.pt"
    model = torch.load(best, weights_only=True)["model"]
    after = {name: model[f"backbone.{name}"] for name in before}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("stem.")}

    params = json.loads((folder / "outputs" / "fine_tune" / "params.json").read_text())
    rates = {row["name"]: row["options"]["lr"] for row in params if row["trainable"] and row["name"].endswith("weight")}
    assert rates == {
        "backbone.stage1.0.weight": pytest.approx(0.000125),
        "backbone.stage2.0.weight": pytest.approx(0.00025),
        "backbone.stage3.0.weight": pytest.approx(0.0005),
        "head.weight": pytest.approx(0.004),
    }

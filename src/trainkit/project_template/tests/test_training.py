"""The data and the model fit each other, and every experiment trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trainkit

from project_name.data import Rings
from project_name.models import Net

PROJECT = Path(__file__).parents[1]
EXPERIMENTS = sorted(file.stem for file in PROJECT.glob("conf/experiment/*.yaml"))


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the folder of the project, because trainkit reads ./conf."""
    monkeypatch.chdir(PROJECT)


def test_the_points_depend_only_on_the_seed() -> None:
    first, same, other = (Rings(size=9, noise=0.1, seed=seed).points for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_model_returns_a_logit_for_each_class() -> None:
    rings = Rings(size=5, noise=0.1, seed=0)
    model = Net(width=8, num_classes=len(rings.classes))
    assert model(rings.points).shape == (5, 3)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_a_step(name: str, tmp_path: Path) -> None:
    config = trainkit.compose([f"experiment={name}", "epochs=1", "limit_batches=1"])
    run = trainkit.train(config, directory=tmp_path)
    assert run.history[-1]["step"] == 1


def test_the_baseline_can_learn_one_batch_by_heart(tmp_path: Path) -> None:
    always_the_same_batch = ["limit_batches=1", "data.shuffle=off"]
    config = trainkit.compose(["experiment=baseline", "epochs=100", "evaluation_step=off", *always_the_same_batch])
    run = trainkit.train(config, directory=tmp_path)
    assert run.history[-1]["train/loss"] < 0.05

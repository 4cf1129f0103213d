"""The directory of a run, through the Python API."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import trainkit
from trainkit.core.errors import ConfigError, RunDirectoryInUseError
from trainkit.core.paths import claim_directory
from trainkit.runs.directory import Run

QUICK = ["model=mlp", "epochs=2", "limit_batches=2", "progress=off"]


def test_train_returns_a_run_with_its_history_and_best_epoch(here: Path) -> None:
    run = trainkit.train(trainkit.compose(QUICK))
    assert [line["epoch"] for line in run.history] == [1, 2]
    assert run.best is not None
    assert run.best["value"] == min(line["val/loss"] for line in run.history)
    assert run.directory.resolve() == (here / "outputs" / "latest").resolve()
    assert Run.load(run.directory).best == run.best


def test_run_json_contains_status_versions_and_parameters(here: Path) -> None:  # noqa: ARG001
    run = trainkit.train(trainkit.compose(QUICK))
    info = json.loads((run.directory / "run.json").read_text())
    assert info["status"] == "completed"
    assert info["exit_code"] == 0
    assert info["parameters"] == info["trainable_parameters"] == 3072 * 256 + 256 + 256 * 10 + 10
    assert set(info["versions"]) == {"python", "trainkit", "torch", "numpy", "hydra-core"}
    assert info["pid"] == os.getpid()
    assert info["started"] <= info["ended"]


def test_the_saved_config_is_the_config_of_the_run_with_its_interpolations(here: Path) -> None:  # noqa: ARG001
    config = trainkit.compose([*QUICK, "lr=0.5"])
    run = trainkit.train(config)
    saved = OmegaConf.load(run.directory / ".hydra" / "config.yaml")
    assert saved == config
    assert "lr: ${lr}" in (run.directory / ".hydra" / "config.yaml").read_text()


def test_a_given_directory_is_used_unless_it_holds_a_run(here: Path) -> None:
    run = trainkit.train(trainkit.compose(QUICK), directory=here / "mine")
    assert run.directory == here / "mine"
    with pytest.raises(RunDirectoryInUseError):
        trainkit.train(trainkit.compose(QUICK), directory=here / "mine")
    assert len(run.history) == 2


def test_a_config_changed_by_hand_is_checked_again(here: Path) -> None:  # noqa: ARG001
    config = trainkit.compose(QUICK)
    config.epochs = 0
    with pytest.raises(ConfigError, match="epochs=0"):
        trainkit.train(config)


def test_the_status_file_is_complete_at_every_moment(here: Path) -> None:
    run = Run(claim_directory(here / "run"))
    run.info = {"status": "running"}
    run.write_info()
    before = (here / "run" / "run.json").stat().st_ino
    run.finish("completed", 0)
    assert (here / "run" / "run.json").stat().st_ino != before  # replaced, not overwritten
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "completed"

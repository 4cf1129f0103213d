"""The directory of a run, through the Python API."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import trainkit
from trainkit.core.errors import ConfigError, RunDirectoryInUseError
from trainkit.core.paths import claim_directory
from trainkit.runs.directory import Run
from trainkit.runs.history import History, history_line

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


@pytest.mark.parametrize("left", ["checkpoints", "history.jsonl", "run.json"])
def test_a_directory_with_files_of_a_run_is_never_used_for_a_new_run(left: str, here: Path) -> None:
    run = trainkit.train(trainkit.compose(QUICK), directory=here / "run")
    for name in {"checkpoints", "history.jsonl", "run.json"} - {left}:
        path = run.directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(here.rglob("*"))
    with pytest.raises(RunDirectoryInUseError, match=f"it contains {left}"):
        trainkit.train(trainkit.compose(QUICK), directory=here / "run")
    assert sorted(here.rglob("*")) == before


def test_a_directory_without_run_json_is_resumed_from_its_checkpoint(here: Path) -> None:
    run = trainkit.train(trainkit.compose(QUICK), directory=here / "run")
    (run.directory / "run.json").unlink()
    assert [row["epoch"] for row in trainkit.resume(here / "run", ["epochs=3"]).history] == [1, 2, 3]


def test_metrics_that_are_not_finite_are_strict_json_and_are_read_as_floats(tmp_path: Path) -> None:
    metrics = {"epoch": 1, "val/loss": math.nan, "a": math.inf, "b": -math.inf, "c": 0.5, "d": [math.nan, 1.0]}
    history = History(tmp_path / "history.jsonl")
    history.append(history_line(metrics))

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    stored = json.loads((tmp_path / "history.jsonl").read_text(), parse_constant=refuse)
    assert stored["val/loss"] is None
    assert stored["not_finite"] == {"val/loss": "nan", "a": "inf", "b": "-inf"}
    (row,) = history.rows
    assert math.isnan(row["val/loss"])
    assert (row["a"], row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 0.5, [None, 1.0])
    assert "not_finite" not in row


def test_a_history_of_an_older_version_with_nan_is_read(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"epoch": 1, "val/loss": NaN}\n')
    (row,) = History(tmp_path / "history.jsonl").rows
    assert math.isnan(row["val/loss"])


def test_the_names_of_a_run_and_of_its_files_are_on_the_disk_before_it_trains(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/dev/fd/{descriptor}").resolve().relative_to(here)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr("trainkit.engine.train.fit", lambda *_: synced.append("training"))
    trainkit.train(trainkit.compose(QUICK), directory=here / "runs" / "one")
    before = synced[: synced.index("training")]
    assert "runs/one" in before
    assert "runs" in before
    assert any("run.json" in name for name in before)


def test_the_names_of_a_history_and_of_a_resume_are_synced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainkit.train(trainkit.compose(QUICK), directory=here / "run")
    synced: list[Path] = []
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        synced.append(Path(f"/dev/fd/{descriptor}").resolve())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    trainkit.resume(run, ["epochs=3"])
    assert here / "run" in synced
    assert here / "run" / "history.jsonl" in synced


def test_a_process_whose_lock_was_deleted_stops_before_it_writes(here: Path) -> None:
    first = trainkit.train(trainkit.compose([*QUICK, "epochs=1"]), directory=here / "run")
    run = Run.load(first.directory)
    run.acquire()
    (here / "run" / ".lock").unlink()
    (here / "run" / ".lock").write_text("{}")  # as another process does
    before = (here / "run" / "run.json").read_text(), (here / "run" / "history.jsonl").read_text()
    with pytest.raises(RunDirectoryInUseError, match="was deleted or replaced"):
        run.append_epoch({"epoch": 9}, None)
    run.finish("completed", 0)
    assert ((here / "run" / "run.json").read_text(), (here / "run" / "history.jsonl").read_text()) == before

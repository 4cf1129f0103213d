"""A training whose surroundings change or fail: deleted folders, dangling links, too little memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Command
from tests.helpers import read_history
from tests.processes import Forks

MODULE = """
import os
import shutil
from pathlib import Path
from torch import nn

class Deletes:
    def on_start(self, state):
        shutil.rmtree(Path.cwd(), ignore_errors=True)

def greedy(*args, **kwargs):
    raise MemoryError

def greedy_tensor(*args, **kwargs):
    import torch
    return torch.empty(2**50)

class GreedyModel(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.layer = nn.Linear(2**25, 2**25)

class GreedySamples:
    classes = ["a", "b"]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise MemoryError
"""
QUICK = ["epochs=1", "limit_batches=2", "progress=off"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of 40 images in two classes, two of them links to missing files."""
    for number in range(40):
        file = tmp_path / "images" / f"class{number % 2}" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number in (6, 17):
            file.symlink_to(tmp_path / "missing.png")
        else:
            Image.new("RGB", (8, 8), (6 * number, 0, 0)).save(file)
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", "auto", "memory"])
def test_a_dangling_link_in_an_image_folder_is_skipped(
    cache: str, workers: int, images: Path, forked: Command, tmp_path: Path
) -> None:
    argv = ["data=image_folder", f"data.root={images}", "data.size=8", "model=mlp", "batch_size=10", "data.split=off"]
    argv += [f"data.cache={cache}", f"data.num_workers={workers}", "epochs=2", "progress=off", "hydra.run.dir=run"]
    done = forked(*argv, "data.on_unreadable=skip", TRAINKIT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert read_history(tmp_path / "run")[-1]["train/samples"] == 38
    assert "06.png" in (tmp_path / "run" / "trainkit.log").read_text()
    done = forked(*argv, "hydra.run.dir=other", TRAINKIT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 5
    assert ".png" in done.stderr
    assert "data.on_unreadable=skip" in done.stderr


def test_a_deleted_working_directory_does_not_fail_a_completed_run(tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "envmodule.py").write_text(MODULE)
    run = tmp_path / "run"
    argv = [*QUICK, f"hydra.run.dir={run}", "+hooks.deletes._target_=envmodule.Deletes"]
    shutil.copy(tmp_path / "envmodule.py", folder)
    done = forks.start(*argv, cwd=folder)
    assert done.wait() == 0, done.stderr
    assert not folder.exists()
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    assert str(run) in done.stdout


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("data.train", ["data.train._target_=envmodule.greedy"]),
        ("data.train", ["data.train._target_=envmodule.greedy_tensor"]),
        ("data.train", ["data.train._target_=envmodule.GreedySamples", "data.cache=memory"]),
        ("model", ["model._target_=envmodule.greedy"]),
        ("model", ["model._target_=envmodule.GreedyModel"]),
        ("loss", ["loss=mse", "loss._target_=envmodule.greedy"]),
    ],
)
def test_too_little_memory_for_an_object_has_its_own_exit_code(
    key: str, overrides: list[str], forked: Command, tmp_path: Path
) -> None:
    (tmp_path / "envmodule.py").write_text(MODULE)
    done = forked(*QUICK, *overrides)
    assert done.returncode == 8, done.stderr
    assert done.stderr.startswith(f"error: {key}: ")
    assert "memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_limit_of_any_size_is_accepted(forked: Command) -> None:
    done = forked(*QUICK, "data.cache_limit=1e300")
    assert done.returncode == 0, done.stderr

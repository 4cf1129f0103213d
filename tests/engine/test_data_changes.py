"""A resume notices that its data is other data: another length, other contents, other files."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Command
from trainkit.data.contents import TOLERANCE, data_facts, differing_facts
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store
from trainkit.runs.checkpoint import Checkpoints

MODULE = """
import os
import random
import numpy as np
import torch

class Points:
    '''Samples of an array in a file.'''
    classes = ["a", "b"]

    def __init__(self, file):
        self.x = torch.from_numpy(np.load(file)["X"]).float()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % 2

class Random(Points):
    '''Samples that differ between all reads, in values and in shape.'''

    def __init__(self, size=32):
        self.size, self.generator = size, random.SystemRandom()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((4,), self.generator.random()), index % 2
"""
QUICK = ["model=mlp", "data.normalize=off", "batch_size=8", "progress=off", "hydra.run.dir=run"]


def write_arrays(file: Path, *, rows: int = 64, val_rows: int = 16, seed: int = 0) -> None:
    """Write random arrays with the same classes; `seed` changes the inputs only."""
    draw = np.random.default_rng(seed)
    x, x_val = draw.normal(size=(rows, 4)), draw.normal(size=(val_rows, 4))
    np.savez(file, X=x, y=np.arange(rows) % 2, X_val=x_val, y_val=np.arange(val_rows) % 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with arrays, images and a module of data sets."""
    (tmp_path / "pointmodule.py").write_text(MODULE)
    write_arrays(tmp_path / "a.npz")
    for part in ("train", "val"):
        for number in range(12):
            file = tmp_path / "images" / part / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    return tmp_path


def refused(done: Any, *words: str) -> None:
    """Check that a resume was refused, with a line about each of `words`."""
    assert done.returncode == 3, done.stderr
    for word in words:
        assert f"data ({word}): " in done.stderr, done.stderr
    assert re.search(r"resume.allow=\[(seed,)?data\]", done.stderr)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_rows": 24}, ["validation samples"]),
        ({"rows": 80}, ["training samples"]),
        ({"seed": 1}, ["training contents", "validation contents"]),
    ],
)
def test_other_arrays_are_refused_unless_they_are_allowed(
    change: dict[str, int], words: list[str], folder: Path, forked: Command
) -> None:
    argv = ["data=arrays", "data.file=a.npz", *QUICK]
    assert forked(*argv, "epochs=1").returncode == 0
    write_arrays(folder / "a.npz", **change)
    refused(forked("resume", "run", "epochs=2"), *words)
    part = "data.val" if words == ["validation samples"] else "data"
    done = forked("resume", "run", "epochs=2", f"resume.allow=[{part}]")
    assert done.returncode == 0, done.stderr
    assert "from here on" in (folder / "run" / "trainkit.log").read_text()
    done = forked("resume", "run", "epochs=3")  # a change is allowed once
    assert done.returncode == 0, done.stderr


def test_other_images_are_refused_and_moved_or_touched_images_are_not(folder: Path, forked: Command) -> None:
    argv = ["data=image_folder", "data.root=images", "data.size=8", *QUICK, "data.num_workers=0"]
    cache = {"TRAINKIT_CACHE": str(folder / "cache")}
    done = forked(*argv, "epochs=1", **cache)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "images", folder / "elsewhere")  # also changes each mtime
    done = forked("resume", "run", "epochs=2", "data.root=elsewhere", **cache)
    assert done.returncode == 0, done.stderr
    for cache_key in ("none", "auto"):
        changed = folder / "elsewhere" / "val" / "class1" / "3.png"
        changed.write_bytes(changed.read_bytes() + b"\0")
        refused(forked("resume", "run", "epochs=3", f"data.cache={cache_key}", **cache), "validation files")


def test_samples_that_differ_between_reads_are_not_refused(folder: Path, forked: Command) -> None:  # noqa: ARG001
    argv = [*QUICK, "data.train._target_=pointmodule.Random", "data.val={_target_: pointmodule.Random, size: 16}"]
    argv += ["data.split=off"]
    for cache, workers in (("none", 0), ("auto", 2), ("none", 2)):
        run = f"hydra.run.dir={cache}{workers}"
        done = forked(*argv, run, "epochs=1", f"data.cache={cache}", f"data.num_workers={workers}")
        assert done.returncode == 0, done.stderr
        done = forked("resume", f"{cache}{workers}", "epochs=2")
        assert done.returncode == 0, done.stderr
    refused(forked("resume", "none0", "epochs=3", "data.val.size=24", "resume.allow=[seed]"), "validation samples")


def test_held_and_streamed_samples_compare_the_facts_of_both(folder: Path, forked: Command) -> None:
    argv = [*QUICK, "data.train={_target_: pointmodule.Points, file: a.npz}", "data.val=null", "data.split=0.25"]
    done = forked(*argv, "epochs=1")
    assert done.returncode == 0, done.stderr
    done = forked("resume", "run", "epochs=2", "data.cache=none")
    assert done.returncode == 0, done.stderr
    done = forked("resume", "run", "epochs=3", "data.cache=memory")
    assert done.returncode == 0, done.stderr
    write_arrays(folder / "a.npz", seed=3)
    refused(forked("resume", "run", "epochs=4", "data.cache=memory"), "training contents", "validation contents")


def test_a_checkpoint_of_an_older_version_resumes_without_a_word(folder: Path, forked: Command) -> None:
    assert forked("data=arrays", "data.file=a.npz", *QUICK, "epochs=1").returncode == 0
    checkpoints = folder / "run" / "checkpoints"
    saved = Checkpoints(checkpoints).newest()[1]
    saved["fingerprint"]["data"] = {"training samples": 64}
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()
    Checkpoints(checkpoints).write(saved)
    done = forked("resume", "run", "epochs=2")
    assert done.returncode == 0, done.stderr
    assert "data (" not in done.stderr


def loader_of(inputs: torch.Tensor, targets: Any = None) -> Any:
    """Return a loader of a data set in memory."""
    targets = torch.arange(len(inputs)) % 2 if targets is None else targets
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    return make_loader(Store.of(dataset), Prepare(torch.device("cpu")), batch_size=8, seed=0)


def test_rounding_is_no_difference_and_one_changed_row_is() -> None:
    inputs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    facts = data_facts(loader_of(inputs), "training")
    assert differing_facts(facts, data_facts(loader_of(inputs * (1 + 1e-6)), "training")) == {}
    assert differing_facts(facts, data_facts(loader_of(inputs * (1 + 10 * TOLERANCE)), "training"))
    other = inputs.clone()
    other[17] = other[18]
    assert list(differing_facts(facts, data_facts(loader_of(other), "training"))) == ["training contents"]
    labels = torch.arange(64) % 2
    labels[5] = 0
    assert list(differing_facts(facts, data_facts(loader_of(inputs, labels), "training"))) == ["training contents"]
    shape = data_facts(loader_of(inputs.reshape(64, 192)), "training")
    assert "training structure" in differing_facts(facts, shape)


def test_the_facts_of_a_large_data_set_take_milliseconds(tmp_path: Path) -> None:
    loader = loader_of(torch.zeros(20_000, 3, 32, 32, dtype=torch.uint8))
    durations = []
    for _ in range(5):
        began = time.perf_counter()
        data_facts(loader, "training")
        durations.append(time.perf_counter() - began)
    print(f"held: {min(durations) * 1e3:.1f} ms")
    assert min(durations) < 0.1

    class Files:
        def __init__(self) -> None:
            self.files = [str(tmp_path / f"{number}") for number in range(1000)]

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Any:
            raise AssertionError

    dataset = Files()
    for file in dataset.files:
        Path(file).touch()
    loader = make_loader(Store(dataset), Prepare(torch.device("cpu")), batch_size=8, seed=0, num_workers=2)
    began = time.perf_counter()
    assert len(data_facts(loader, "training")["training files"]) == 16
    print(f"files: {(time.perf_counter() - began) * 1e3:.1f} ms")

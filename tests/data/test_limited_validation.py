"""A limited validation takes the same seeded sample of the whole set, whichever way the samples are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tests.conftest import Command
from tests.data.test_datasets import Items, pairs
from tests.data.test_image_folder import folder
from tests.helpers import CPU, read_history
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store

RECORD = """
import torch

class Record(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.LazyLinear(3)

    def forward(self, images):
        if not self.training:
            with open("seen.txt", "a") as file:
                print(*(images[:, :2, 0, 0] * 255).round().long().tolist(), file=file)
        return self.classifier(images.flatten(1))
"""
ARGUMENTS = [
    *("data=image_folder", "data.root=images", "data.size=8", "model=recorded", "batch_size=4", "epochs=2"),
    *("limit_batches=2", "memory_format=contiguous", "progress=off", "hydra.run.dir=run"),
]


def seen(command: Command, path: Path, *more: str) -> list[str]:
    """Return the colors of the images of each batch that a run validates."""
    (path / "seen.txt").unlink(missing_ok=True)
    done = command(*ARGUMENTS, *more)
    assert done.returncode == 0, done.stderr
    return (path / "seen.txt").read_text().splitlines()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        folder(tmp_path / "images" / part, "cat", "dog", "eel", count=20, size=(8, 8))
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "recorded.yaml").write_text("_target_: recorded.Record\n")
    (tmp_path / "recorded.py").write_text(RECORD)
    return tmp_path


def test_limit_batches_validates_a_sample_of_all_classes_of_an_image_folder(images: Path, forked: Command) -> None:
    batches = seen(forked, images)
    first, second = batches[-4:-2], batches[-2:]
    assert first == second  # of the two epochs
    colors = [color.split(", ") for color in " ".join(first).replace("[", "").split("]")[:-1]]
    order = [(int(red) // 60, int(green)) for red, green in colors]
    assert len({label for label, _ in order}) == 3
    assert len(set(order)) == 8
    assert order == sorted(order, key=lambda color: (color[0], f"{color[1]}.png"))  # as the files are listed
    for number, more in enumerate((["data.num_workers=2"], ["data.cache=memory"], ["seed=7"])):
        assert seen(forked, images, *more, f"hydra.run.dir=run{number}")[-2:] == first
    assert [row["epoch"] for row in read_history(images / "run")] == [1, 2]


def batches_of(limit: int | None, store: Store, workers: int = 0) -> Iterator[Tensor]:
    loader = make_loader(store, Prepare(CPU), batch_size=4, seed=None, limit_batches=limit, num_workers=workers)
    for epoch in (0, 5):
        yield torch.cat([targets for _, targets in pairs(loader, epoch)])
    loader.close()


def test_a_limited_order_without_a_seed_is_a_fixed_sample_in_the_order_of_the_set() -> None:
    dataset = TensorDataset(torch.zeros(50, 2), torch.arange(50))
    (first, second) = batches_of(3, Store.of(dataset))
    assert first.equal(second)
    assert first.tolist() == sorted(set(first.tolist()))
    assert len(first) == 12
    assert first.max() > 24
    for workers in (0, 2):
        for streamed in batches_of(3, Store.of(Items(dataset)), workers):
            assert streamed.equal(first)
    smaller, _ = batches_of(2, Store.of(dataset))
    assert set(smaller.tolist()) < set(first.tolist())


@pytest.mark.parametrize("limit", [None, 13, 20])
def test_an_order_without_a_seed_that_holds_all_samples_is_that_of_the_set(limit: int | None) -> None:
    for order in batches_of(limit, Store.of(TensorDataset(torch.zeros(50, 2), torch.arange(50)))):
        assert order.tolist() == list(range(50))


def test_a_limited_loader_names_the_samples_that_it_reads() -> None:
    dataset = TensorDataset(torch.zeros(50, 2), torch.arange(50))
    loader = make_loader(Store.of(dataset), Prepare(CPU), batch_size=4, seed=None, limit_batches=2)
    (inputs, targets), *_ = pairs(loader, start=1)
    assert loader.describe(0, 1, inputs) == f"samples {', '.join(map(str, targets.tolist()))}"

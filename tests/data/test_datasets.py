"""Data sets, the split, and loaders whose batches do not depend on how samples are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from trainkit.core import pytree as nested
from trainkit.core.errors import DataError
from trainkit.data import datasets as data
from trainkit.data.loaders import Loader, epoch_order, make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.sample_errors import NotAPairError
from trainkit.data.split import count_classes, split
from trainkit.data.store import Store

CPU = torch.device("cpu")


class Items(Dataset[tuple[Tensor, int]]):
    """The samples of a `TensorDataset`, read one by one."""

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors.tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tensors[0][index], int(self.tensors[1][index])


def pairs(loader: Loader, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(loader.batches(epoch, start))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_the_digits_are_the_1797_samples_of_the_uci_set_with_three_channels() -> None:
    images, targets = data.digits().tensors
    assert images.shape == (1797, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert torch.equal(images[:, 0], images[:, 2])
    assert targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("workers", [0, 2])
def test_sliced_and_streamed_batches_are_equal(workers: int) -> None:
    dataset = data.synthetic(size=50, shape=[3, 4, 4])
    prepare = Prepare(CPU, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.5))
    sliced = make_loader(Store.of(dataset), prepare, batch_size=8, seed=1)
    streamed = make_loader(Store.of(Items(dataset)), prepare, batch_size=8, seed=1, num_workers=workers)
    assert type(sliced) is not type(streamed)
    for epoch in (0, 1):
        assert same(pairs(sliced, epoch), pairs(streamed, epoch))


@pytest.mark.parametrize("form", [lambda d: d, Items], ids=["sliced", "streamed"])
def test_a_loader_starts_at_any_batch_of_any_epoch(form: Callable[[TensorDataset], Any]) -> None:
    loader = make_loader(Store.of(form(data.synthetic(size=50, shape=[4]))), Prepare(CPU), batch_size=8, seed=1)
    assert len(loader) == 7
    assert same(pairs(loader, 3, start=5), pairs(loader, 3)[5:])


def test_the_order_of_an_epoch_is_a_permutation_made_from_seed_and_epoch() -> None:
    orders = {(seed, epoch): epoch_order(40, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order.tolist()) == list(range(40)) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    torch.manual_seed(5)
    assert torch.equal(epoch_order(40, 1, 1), orders[1, 1])


def test_reading_data_does_not_advance_the_rng_of_the_model() -> None:
    loader = make_loader(Store.of(Items(data.synthetic(size=50, shape=[4]))), Prepare(CPU), batch_size=8, seed=1)
    before = torch.get_rng_state()
    pairs(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_images_become_floats_from_0_to_1_and_are_normalised_by_channel() -> None:
    images = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    inputs, _ = Prepare(CPU, mean, std)(images, torch.zeros(4))
    wanted = (images.double() / 255 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    torch.testing.assert_close(inputs.double(), wanted, rtol=1e-6, atol=1e-6)
    assert Prepare(CPU)(images, torch.zeros(4))[0].equal(images.float() / 255)


def test_inputs_may_be_nested() -> None:
    class Dicts(Items):
        def __getitem__(self, index: int) -> Any:
            return {"image": self.tensors[0][index], "id": index}, int(self.tensors[1][index])

    loader = make_loader(
        Store.of(Dicts(data.synthetic(size=10, shape=[3, 2, 2]))), Prepare(CPU), batch_size=4, seed=None
    )
    inputs, targets = pairs(loader)[0]
    assert inputs["image"].dtype == torch.float32
    assert inputs["id"].tolist() == [0, 1, 2, 3]
    assert targets.tolist() == [0, 1, 2, 3]


def test_a_subclass_of_tensor_dataset_may_change_its_samples() -> None:
    class Shifted(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + 1000, y

    dataset = Shifted(torch.zeros(8, 2), torch.zeros(8))
    store = Store.of(dataset)
    for part in (store, split(store, 0.5)[0]):
        inputs, _ = pairs(make_loader(part, Prepare(CPU), batch_size=4, seed=0))[0]
        assert inputs.unique().tolist() == [1000.0]


def test_a_data_set_is_indexed_with_python_ints() -> None:
    class Strict(Items):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            assert type(index) is int
            return super().__getitem__(index)

    assert (
        len(pairs(make_loader(Store.of(Strict(data.synthetic(size=9, shape=[2]))), Prepare(CPU), batch_size=4, seed=0)))
        == 3
    )


def test_samples_that_are_not_pairs_or_contain_no_values_are_an_error() -> None:
    class Triples(Items):
        def __getitem__(self, index: int) -> Any:
            return self.tensors[0][index], 1, 2

    with pytest.raises(NotAPairError, match="returns a tuple of 3 values, and a sample must be a pair"):
        pairs(make_loader(Store.of(Triples(data.synthetic(size=9, shape=[2]))), Prepare(CPU), batch_size=4, seed=0))
    with pytest.raises(DataError, match="do not contain a tensor"):
        nested.batch_size_of({"id": None})


def test_the_size_of_a_batch_is_that_of_its_first_tensor_or_list_of_samples_else_of_its_strings() -> None:
    assert nested.batch_size_of({"id": ["a", "b", "c"], "x": torch.zeros(2, 3)}) == 2
    assert nested.batch_size_of((["a", "b", "c"], nested.Samples([torch.zeros(5), torch.zeros(6)]))) == 2
    assert nested.batch_size_of({"id": ["a", "b", "c"]}) == 3


def test_the_split_is_proportional_for_small_classes_too() -> None:
    dataset = TensorDataset(torch.zeros(100), torch.arange(100) % 50)
    assert len(split(Store.of(dataset), 0.2)[1]) == 20


def test_the_split_holds_out_the_same_share_of_each_class_and_loses_no_sample() -> None:
    dataset = data.digits()
    train, val = split(Store.of(dataset), 0.2)
    assert len(train) + len(val) == 1797
    for label in range(10):
        count = int((dataset.tensors[1] == label).sum())
        assert abs(int((dataset.tensors[1][val.dataset.indices] == label).sum()) - 0.2 * count) < 1
    assert len(val) == round(0.2 * 1797)
    streamed = split(Store.of(Items(dataset)), 0.5)
    assert len(set(streamed[0].dataset.indices) | set(streamed[1].dataset.indices)) == 1797


def test_limit_batches_shortens_an_epoch() -> None:
    loader = make_loader(
        Store.of(data.synthetic(size=50, shape=[4])), Prepare(CPU), batch_size=8, seed=1, limit_batches=2
    )
    assert len(loader) == len(pairs(loader)) == 2
    assert loader.samples == 16


def test_line_returns_its_points() -> None:
    x, y = data.line(x=[2.0], slope=5.0).tensors
    assert (x.tolist(), y.tolist()) == ([[2.0]], [[10.0]])


def test_arrays_are_read_from_a_file_with_their_validation_part(here: Path) -> None:
    np.savez(here / "a.npz", X=np.ones((6, 3)), y=np.arange(6.0), X_val=np.zeros((2, 3)), y_val=np.zeros(2))
    train, val = data.arrays("a.npz"), data.arrays("a.npz", part="val")
    assert train is not None
    assert val is not None
    assert (train.tensors[0].dtype, train.tensors[1].shape) == (torch.float32, (6, 1))
    assert len(val) == 2
    np.savez(here / "b.npz", X=np.ones((6, 3), dtype=np.uint8), y=np.arange(6, dtype=np.int32))
    classes = data.arrays("b.npz")
    assert classes is not None
    assert (classes.tensors[0].dtype, classes.tensors[1].dtype) == (torch.uint8, torch.int64)
    assert data.arrays("b.npz", part="val") is None
    assert count_classes(classes) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"X": np.ones(3)}, "no array"),
        ({"X": np.ones(3), "y": np.ones(4)}, "3 rows, but y has 4"),
        ({"X": np.array(["a", "b"]), "y": np.ones(2)}, "cannot be trained on"),
        (b"not a zip file", "data.file"),
    ],
)
def test_arrays_that_do_not_fit_are_a_data_error(here: Path, content: Any, words: str) -> None:
    if isinstance(content, bytes):
        (here / "a.npz").write_bytes(content)
    else:
        np.savez(here / "a.npz", **content)
    with pytest.raises(DataError, match=words):
        data.arrays("a.npz")

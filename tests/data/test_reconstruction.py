"""Targets that are the inputs, as for an autoencoder, are treated as the inputs in every way of reading."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from tests.conftest import Command
from tests.data.test_cache import OPTIONS, made, settings_of
from tests.helpers import COUNT, CPU, IMAGES, LABELS, ItemDataset, read_history
from trainkit.build import data as build_data
from trainkit.core.errors import DataError
from trainkit.data import cache
from trainkit.data.augment import Augment
from trainkit.data.cacheable import samples_equal
from trainkit.data.loaders import Loader, make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.reading import CollatedBatch, ReadSamples, collate
from trainkit.data.split import split
from trainkit.data.store import Store

SETS = """
import torch
from PIL import Image
from trainkit.data import digits

IMAGES = digits().tensors[0][:100]


class Pictures:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        image = Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy())
        return image, image


def tensors():
    return torch.utils.data.TensorDataset(IMAGES, IMAGES)


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return images * self.factor
"""
ARGUMENTS = [
    *("data=mine", "model=scale", "loss=mse", "lr=0", "batch_size=32", "epochs=1"),
    *("memory_format=contiguous", "progress=off"),
]
WAYS = {
    "held": ("data.cache=memory",),
    "streamed": ("data.cache=none",),
    "workers": ("data.cache=none", "data.num_workers=2"),
}


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    for group, text in {
        "data": 'set: Pictures\ntrain: {_target_: "sets.${data.set}"}\nsplit: 0.2\nclasses: 1\n',
        "model": "_target_: sets.Scale\n",
    }.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{'mine' if group == 'data' else 'scale'}.yaml").write_text(text)
    (tmp_path / "sets.py").write_text(SETS)
    return tmp_path


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", ["Pictures", "tensors"])
def test_an_identity_has_the_loss_0_on_images_that_are_their_own_target(
    name: str, way: str, sets: Path, forked: Command
) -> None:
    augment = "data.augment={flip: random, crop_padding: 3, cutout: 5}"
    for number, more in enumerate(([], ["data.normalize={mean: 0.5, std: 0.25}", augment])):
        done = forked(*ARGUMENTS, f"data.set={name}", *WAYS[way], *more, f"hydra.run.dir=run{number}")
        assert done.returncode == 0, done.stderr
        (row,) = read_history(sets / f"run{number}")
        assert (row["train/loss"], row["val/loss"]) == (0, 0), json.dumps(row)


def test_mixed_images_that_are_their_own_target_are_a_data_error(sets: Path, forked: Command) -> None:
    assert sets.is_dir()
    for name in ("mixup", "cutmix"):
        done = forked(*ARGUMENTS, f"data.augment={{{name}: 0.4}}")
        assert done.returncode == 5, done.stderr
        assert done.stderr.startswith(f"error: data.augment.{name}: it mixes class targets, and these targets are the")
        assert f"write data.augment.{name}=off" in done.stderr


# --------------------------------------------------------------------------------------- the ways of reading


def twice(part: Any) -> Any:
    return part, part


def picture(index: int) -> Any:
    return Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy())


def items_of(name: str) -> ItemDataset:
    return ItemDataset(lambda index: twice(INPUTS[name](index)))


INPUTS: dict[str, Callable[[int], Any]] = {
    "pictures": picture,
    "tensors": lambda index: IMAGES[index],
    "arrays": lambda index: IMAGES[index].numpy(),
    "floats": lambda index: IMAGES[index] / 255,
    "doubles": lambda index: IMAGES[index].double() / 255,
    "vectors": lambda index: IMAGES[index].flatten(),
    "nested": lambda index: {"a": IMAGES[index], "b": [IMAGES[index, 0], LABELS[index]]},
}
FORMS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(items_of, name) for name in INPUTS},
    "views": lambda: ItemDataset(lambda i: (IMAGES[i], IMAGES[i])),
    "TensorDataset": lambda: TensorDataset(IMAGES, IMAGES),
    "Subset": lambda: Subset(TensorDataset(IMAGES, IMAGES), range(2, 40)),
    "Subset of items": lambda: Subset(FORMS["pictures"](), range(2, 40)),
}
IMAGE_FORMS = sorted({*FORMS} - {"nested", "vectors"})


def loader_of(dataset: Any, how: str, workers: int = 0, augment: Augment | None = None) -> Loader:
    store = cache.make_store(dataset, how, CPU, **{**OPTIONS, "workers": workers})
    assert (store.tensors is None) == (how == "none")
    prepare = Prepare(CPU, torch.tensor(0.5), torch.tensor(0.25), augment)
    return make_loader(store, prepare, batch_size=8, seed=3, num_workers=workers)


def equal(one: Any, other: Any) -> bool:
    return samples_equal((one, ()), (other, ()))


@pytest.mark.parametrize("form", list(FORMS))
def test_targets_are_the_prepared_inputs_whichever_way_they_are_read(form: str) -> None:
    augment = None
    if form in IMAGE_FORMS:
        augment = Augment(3, flip="random", crop_padding=2, cutout=3)
    wanted = [inputs for inputs, _ in loader_of(FORMS[form](), "none", augment=augment).batches(1)]
    for how, workers in (("none", 0), ("none", 2), ("memory", 0), ("memory", 2)):
        loader = loader_of(FORMS[form](), how, workers, augment)
        batches = list(loader.batches(1))
        loader.close()
        assert len(batches) == len(wanted)
        for (inputs, targets), expected in zip(batches, wanted, strict=True):
            assert equal(inputs, expected)
            assert equal(inputs, targets)
    inputs, targets = loader.example()
    assert equal(inputs, targets)


def test_a_model_that_changes_its_inputs_in_place_does_not_change_the_targets() -> None:
    for how in ("none", "memory"):
        for inputs, targets in loader_of(FORMS["pictures"](), how).batches(0):
            inputs.add_(1)
            torch.testing.assert_close(inputs, targets + 1)


@pytest.mark.parametrize("how", ["none", "memory"])
def test_a_split_keeps_targets_that_are_the_inputs(how: str) -> None:
    for form in ("pictures", "TensorDataset"):
        for part in split(cache.make_store(FORMS[form](), how, CPU, **OPTIONS), 0.4):
            for inputs, targets in make_loader(part, Prepare(CPU), batch_size=8, seed=None).batches(0):
                assert equal(inputs, targets)


def test_samples_in_memory_are_stored_once_on_each_device() -> None:
    for form in ("pictures", "nested", "TensorDataset"):
        store = cache.make_store(FORMS[form](), "memory", CPU, **OPTIONS)
        for held in (store, store.to(torch.device("meta")), store.subset(torch.arange(len(store)) > 4)):
            assert held.tensors is not None
            assert held.tensors[1] is held.tensors[0]
    assert store.nbytes == IMAGES.nbytes
    limit = {**OPTIONS, "limit": IMAGES.nbytes}
    assert cache.make_store(FORMS["pictures"](), "auto", CPU, **limit).tensors is not None


def test_decoded_samples_on_disk_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path))
    dataset = FORMS["pictures"]()
    dataset.cache_as = ("pictures", "1")
    first, again = (cache.make_store(dataset, "memory", CPU, **OPTIONS) for _ in range(2))
    assert "decoded by an earlier run" in again.place
    assert first.tensors is not None
    assert again.tensors is not None
    assert again.tensors[1] is again.tensors[0]
    assert torch.equal(first.tensors[0], again.tensors[0])
    (file,) = (tmp_path / "decoded").glob("*.bin")
    assert file.stat().st_size < 1.5 * IMAGES.nbytes


def test_pinned_targets_stay_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())
    image = IMAGES[0]
    same = collate(ReadSamples([], [(image, image)] * 2, [0, 0], [])).pin_memory()
    assert same.targets is same.inputs
    separate = collate(ReadSamples([], [(image, image.clone())] * 2, [0, 0], []))
    pinned = separate.pin_memory()
    assert pinned.targets is not pinned.inputs
    assert pinned.inputs is not separate.inputs
    assert CollatedBatch(None, None, [], [(0, "lost")]).pin_memory().inputs is None


# ------------------------------------------------------------------------------------- targets of their own


def test_equal_numbers_and_copies_are_targets_on_their_own() -> None:
    for read in (
        lambda i: (i % 3, i % 3),
        lambda i: (1.0, 1.0 + 0 * i),
        lambda i: (i / 2,) * 2,
        lambda i: (IMAGES[i], IMAGES[i].clone()),
        lambda i: (IMAGES[i], IMAGES[i, :1]),
        lambda i: (IMAGES[i], IMAGES[i].view(torch.int8)),
        lambda i: ({"x": IMAGES[i]}, IMAGES[i]),
    ):
        samples = [read(i) for i in range(4)]
        batch = collate(ReadSamples([], samples, list(range(4)), []))
        assert batch.targets is not batch.inputs


def test_a_batch_with_some_targets_that_are_the_inputs_keeps_its_targets() -> None:
    def some(index: int) -> Any:
        return twice(IMAGES[index]) if index % 2 else (IMAGES[index], 255 - IMAGES[index])

    (inputs, targets), *_ = make_loader(Store.of(ItemDataset(some)), Prepare(CPU), batch_size=8, seed=None).batches(0)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.uint8


@pytest.mark.parametrize("odd", [0, 4, COUNT - 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_with_some_targets_that_are_the_inputs_is_streamed(workers: int, odd: int) -> None:
    for rule in (lambda i: i == odd, lambda i: i != odd):
        dataset = ItemDataset(lambda i, rule=rule: twice(IMAGES[i]) if rule(i) else (IMAGES[i], IMAGES[i].clone()))
        store = cache.make_store(dataset, "auto", CPU, **{**OPTIONS, "workers": workers})
        assert store.tensors is None
        assert store.note.endswith("only a part of its samples have their inputs as target")
        with pytest.raises(DataError, match="only a part of its samples"):
            cache.make_store(dataset, "memory", CPU, **{**OPTIONS, "workers": workers})


def test_targets_that_are_not_the_inputs_are_unchanged() -> None:
    settings = replace(settings_of("maps"), batch_size=COUNT, val_batch_size=COUNT)
    stores = build_data.build_stores(settings, CPU, lambda *_: None)
    ((_, targets),) = build_data.build_loader(settings, stores.train, CPU, train=False).batches(0)
    assert torch.equal(targets, IMAGES / 255)
    assert made("maps")[3][1].equal(IMAGES[3] / 255)

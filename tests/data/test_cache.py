"""Batches from memory equal streamed batches; a data set that cannot be held is streamed, with the reason."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from tests.helpers import COUNT, CPU, IMAGES, LABELS, ItemDataset, ReadSample, compose_settings, unreadable_samples
from trainkit.build import data as build_data
from trainkit.config.schema import AugmentSettings, NormalizeSettings
from trainkit.config.settings import Settings
from trainkit.core.errors import DataError, UserCodeError
from trainkit.core.pytree import map_tensors, tensors_in
from trainkit.data import cache
from trainkit.data.loaders import Loader
from trainkit.data.reading import name_of
from trainkit.data.store import Store

AUGMENT = {"flip": "random", "crop_padding": 2, "crop_fill": "reflect", "cutout": 3, "mixup": 0.4, "cutmix": 1.0}


class Files(ItemDataset):
    """A data set that lists its files and classes, as an image folder does."""

    def __init__(self, read: ReadSample, count: int = COUNT) -> None:
        super().__init__(read, count)
        self.samples = [(f"{index}.png", int(LABELS[index])) for index in range(count)]
        self.targets, self.classes = [target for _, target in self.samples], ["a", "b", "c"]


class Doubled(TensorDataset):
    """Changes the samples that it slices."""

    def __getitem__(self, index: Any) -> Any:
        image, label = super().__getitem__(index)
        return image * 0.5, label


class Part(Subset[Any]):
    """Changes the samples that it selects."""

    def __getitem__(self, index: Any) -> Any:
        image, label = super().__getitem__(index)
        return image * 0.5, label

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def picture(mode: str) -> ReadSample:
    """Return a reader of PIL images in a mode."""

    def read(index: int) -> Any:
        if mode == "I;16":
            return Image.fromarray(IMAGES[index, 0].numpy().astype(np.uint16) * 250), int(LABELS[index])
        return Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy()).convert(mode), int(LABELS[index])

    return read


def drawing(index: int) -> Any:
    noise = torch.rand(3, 8, 6) + torch.from_numpy(np.random.rand(3, 8, 6)) + random.random()
    return (IMAGES[index] / 255 + noise).float(), int(LABELS[index])


def seldom(index: int) -> Any:
    noise = np.random.rand(312) if index == 4 else np.zeros(312)  # NumPy generates 624 words at a time
    return torch.from_numpy(noise), int(LABELS[index])


class Pair(NamedTuple):
    """Inputs with two parts."""

    image: Tensor
    place: float


def nested(index: int) -> Any:
    return {"a": IMAGES[index], "b": [index, {"c": IMAGES[index, 0] / 255}]}, (int(LABELS[index]), {"d": index / 3})


def own_generator() -> ReadSample:
    generator = np.random.default_rng(0)
    return lambda index: (generator.random(3), int(LABELS[index]))


def faulty(index: int) -> Any:
    if index == 4:
        raise ValueError("a bug")
    return IMAGES[index], int(LABELS[index])


KINDS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TensorDataset(IMAGES, LABELS),
    "items": lambda: ItemDataset(lambda i: (IMAGES[i], int(LABELS[i]))),
    "files": lambda: Files(lambda i: (IMAGES[i], int(LABELS[i]))),
    "floats": lambda: ItemDataset(lambda i: (IMAGES[i].numpy() / np.float32(255), LABELS[i])),
    "doubles": lambda: ItemDataset(lambda i: (IMAGES[i].numpy() / 255, np.int64(LABELS[i]))),
    "numbers": lambda: ItemDataset(lambda i: (i, float(LABELS[i]))),
    "vectors": lambda: ItemDataset(lambda i: (IMAGES[i].flatten(), torch.eye(3)[LABELS[i]])),
    "grey": lambda: ItemDataset(picture("L")),
    "colour": lambda: ItemDataset(picture("RGB")),
    "palette": lambda: ItemDataset(picture("P")),
    "deep": lambda: ItemDataset(picture("I;16")),
    "subclass": lambda: Doubled(IMAGES / 255, LABELS),
    "subset": lambda: Subset(Subset(TensorDataset(IMAGES, LABELS), range(1, 45)), list(range(43, 3, -1))),
    "part": lambda: Part(TensorDataset(IMAGES / 255, LABELS), range(5, 40)),
    "from the end": lambda: Subset(TensorDataset(IMAGES, LABELS), list(range(-20, 0))),
    "nested": lambda: ItemDataset(nested),
    "maps": lambda: ItemDataset(lambda i: (IMAGES[i], IMAGES[i] / 255)),
    "named": lambda: ItemDataset(lambda i: (Pair(IMAGES[i], i / 2), [int(LABELS[i]), LABELS[i]])),
    "drawing": lambda: ItemDataset(drawing),
    "seldom": lambda: ItemDataset(seldom),
    "generator": lambda: ItemDataset(own_generator()),
    "shapes": lambda: ItemDataset(lambda i: (IMAGES[i, :, : 8 if i == 4 else 7], int(LABELS[i]))),
    "boxes": lambda: ItemDataset(lambda i: (IMAGES[i], torch.zeros(1 + (i == 4)))),
    "mappings": lambda: ItemDataset(lambda i: ({"x": IMAGES[i, :, : 8 if i == 4 else 7]}, int(LABELS[i]))),
    "arrays": lambda: ItemDataset(lambda i: (IMAGES[i, 0, : 8 if i == 4 else 7].numpy(), int(LABELS[i]))),
    "lists": lambda: ItemDataset(lambda i: ({"x": IMAGES[i], "y": [1.0] * (1 + (i == 4))}, int(LABELS[i]))),
    "keys": lambda: ItemDataset(lambda i: ({"x": IMAGES[i]} | ({} if i == 4 else {"y": i}), int(LABELS[i]))),
    "more keys": lambda: ItemDataset(lambda i: ({"x": IMAGES[i]} | ({"y": i} if i == 4 else {}), int(LABELS[i]))),
    "orders": lambda: ItemDataset(lambda i: ({"a": i, "b": -i} if i % 7 else {"b": -i, "a": i}, int(LABELS[i]))),
    "types": lambda: ItemDataset(lambda i: (IMAGES[i], 1 if i == 4 else 0.5)),
    "gradients": lambda: ItemDataset(lambda i: ((IMAGES[i] / 255).requires_grad_(), int(LABELS[i]))),
    "empty": lambda: ItemDataset(lambda i: ({}, int(LABELS[i]))),
    "words": lambda: ItemDataset(lambda i: (IMAGES[i], "abc"[int(LABELS[i])])),
    "faulty": lambda: ItemDataset(faulty),
    "broken": lambda: Files(unreadable_samples(0, 9, 20, 30)),
    "many": lambda: Files(unreadable_samples(*range(0, 44, 4))),
    "gone": lambda: Files(unreadable_samples(*range(COUNT))),
}
PLAIN = ("numbers", "vectors", "deep", "nested", "maps", "named")  # not images, or of a dtype that cannot be augmented


def made(kind: str) -> Any:
    """Return the data set that the settings below name."""
    return KINDS[kind]()


@functools.cache
def synthetic() -> Settings:
    """Return the settings that those of the tests change. They are frozen, so the tests can share them."""
    return compose_settings(["data=synthetic"])


def settings_of(kind: str, limit_batches: int | None = None, **options: Any) -> Settings:
    known: dict[str, Any] = {
        "train": {"_target_": f"{__name__}.made", "kind": kind},
        "val": None,
        "split": None,
        "classes": 3,
        "normalize": {"mean": 0.5, "std": 0.25},
        "cache_limit": 1.0,
        **options,
    }
    if known["normalize"] is not None:
        known["normalize"] = NormalizeSettings(**known["normalize"])
    if known.get("augment") is not None:
        known["augment"] = AugmentSettings(**known["augment"])
    data = replace(synthetic().data, **{"augment": None, **known})
    return replace(synthetic(), data=data, batch_size=8, seed=3, limit_batches=limit_batches)


def loader(kind: str, **options: Any) -> tuple[Loader, str]:
    """Return the training loader, and the line that says where its samples are stored."""
    settings = settings_of(kind, **options)
    stores = build_data.build_stores(settings, CPU, lambda *_: None)
    return build_data.build_loader(settings, stores.train, CPU, train=True), stores.notes[0]


def digests(kind: str, epoch: int = 1, start: int = 0, **options: Any) -> list[str]:
    """Return a hash of each batch of an epoch."""
    made, _ = loader(kind, **options)
    try:
        return [digest(*batch) for batch in made.batches(epoch, start)]
    finally:
        made.close()


def digest(*parts: Any) -> str:
    containers = map_tensors(parts, lambda part: torch.zeros((), dtype=part.dtype))
    found = hashlib.sha256(repr(containers).encode())
    for part in tensors_in(parts):
        found.update(f"{part.dtype} {tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
        found.update(str(part.is_contiguous()).encode())
    return found.hexdigest()


# -------------------------------------------------------------------------------------------- batches

DETERMINISTIC = list(KINDS)[: list(KINDS).index("drawing")]


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_batches_are_equal_from_memory_and_streamed_by_any_number_of_workers(kind: str) -> None:
    augment = None if kind in PLAIN else AUGMENT
    normalize = None if kind == "deep" else {"mean": 0.5, "std": 0.25}
    both: dict[str, Any] = {"augment": augment, "normalize": normalize}
    wanted = digests(kind, cache="none", **both)
    assert len(set(wanted)) == len(wanted) > 1
    for how, workers in (("auto", 0), ("memory", 0), ("auto", 2), ("none", 2)):
        if (kind, how) != ("deep", "memory"):  # torch cannot slice its dtype
            assert digests(kind, cache=how, num_workers=workers, **both) == wanted, (how, workers)
    for how in ("auto", "none"):
        assert digests(kind, start=2, cache=how, **both) == wanted[2:]
        assert ("in memory" in loader(kind, cache=how)[1]) == (how == "auto" and kind != "deep")


@pytest.mark.parametrize("augment", [None, AUGMENT], ids=["plain", "augmented"])
def test_random_samples_are_equal_in_any_process_and_differ_between_epochs(augment: Any) -> None:
    wanted = digests("drawing", augment=augment)
    for workers in (0, 1, 2):
        for how in ("auto", "none"):
            assert digests("drawing", augment=augment, num_workers=workers, cache=how) == wanted
    assert digests("drawing", start=3, augment=augment, num_workers=2) == wanted[3:]
    made, _ = loader("drawing", augment=augment)
    first, second = ({digest(row) for inputs, _ in made.batches(epoch) for row in inputs} for epoch in (1, 2))
    assert len(first | second) == 2 * COUNT


@pytest.mark.parametrize("kind", ["tensors", "items", "files", "broken"])
def test_the_split_holds_out_the_same_samples_from_memory_and_streamed(kind: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with the largest number
    try:
        parts = {}
        for how in ("none", "memory"):
            settings = settings_of(kind, cache=how, split=0.3, on_unreadable="skip")
            stores = build_data.build_stores(settings, CPU, lambda *_: None)
            assert stores.val is not None
            parts[how] = stores.train, stores.val
    finally:
        torch.use_deterministic_algorithms(False)
    assert [part.dataset.indices for part in parts["none"]] == [part.dataset.indices for part in parts["memory"]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["auto", "memory", "none"])
def test_unreadable_samples_are_skipped_in_the_same_batches(how: str, workers: int) -> None:
    wanted = digests("broken", augment=AUGMENT, cache="none", on_unreadable="skip")
    assert digests("broken", augment=AUGMENT, cache=how, num_workers=workers, on_unreadable="skip") == wanted
    left, _ = loader("broken", cache=how, num_workers=workers, on_unreadable="skip")
    sizes = [len(targets) for _, targets in left.batches(0)]
    left.close()
    assert sum(sizes) == COUNT - 4
    assert left.unreadable == {i: f"sample {i} ({i}.png): OSError: truncated" for i in (0, 9, 20, 30)}


@pytest.mark.parametrize("kind", ["broken", "gone"])
@pytest.mark.parametrize("how", ["auto", "memory", "none"])
def test_an_unreadable_sample_stops_the_run_with_its_name(how: str, kind: str) -> None:
    with pytest.raises(DataError, match=r"sample \d+ \(\d+\.png\): OSError: truncated"):
        digests(kind, cache=how)


def test_too_many_unreadable_samples_stop_the_run_from_memory_and_streamed() -> None:
    for how in ("auto", "none"):
        with pytest.raises(DataError, match="11 of 45 samples cannot be read"):
            digests("many", cache=how, on_unreadable="skip")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_code_of_a_data_set_is_a_user_code_error(workers: int) -> None:
    with pytest.raises(UserCodeError, match=r"^error: data\.train: ValueError: a bug"):
        digests("faulty", num_workers=workers)


# ------------------------------------------------------------------------------ which sets are held


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("drawing", "its samples are random"),
        ("seldom", "its samples are random"),
        ("generator", "sample 0 differs between reads"),
        ("shapes", "differ in shape"),
        ("boxes", "differ in shape"),
        ("mappings", "differ in shape"),
        ("arrays", "differ in shape"),
        ("lists", "differ in shape"),
        ("keys", "type or keys"),
        ("more keys", "type or keys"),
        ("orders", "type or keys"),
        ("types", "type or keys"),
        ("gradients", "require gradients"),
        ("empty", "its inputs contain no tensor"),
        ("words", "its targets contain str"),
    ],
)
def test_a_set_that_cannot_be_held_is_streamed_or_an_error_if_it_must_be_held(kind: str, words: str) -> None:
    _, note = loader(kind)
    assert note.startswith("training data: 45 samples, streamed by the main process: ")
    assert words in note
    with pytest.raises(DataError, match=f"data.cache=memory: .*{words}"):
        loader(kind, cache="memory")


def test_only_cache_auto_obeys_the_limits() -> None:
    size = IMAGES.nbytes + LABELS.nbytes
    for limit, held in ((size / 2**30, True), ((size - 1) / 2**30, False)):
        assert ("in memory" in loader("items", cache_limit=limit)[1]) == held
    assert "data.cache_limit" in loader("items", cache_limit=1e-9)[1]
    assert "in memory" in loader("items", cache_limit=1e-9, cache="memory")[1]
    assert "limit_batches" in loader("items", limit_batches=2)[1]
    assert "in memory" in loader("items", limit_batches=2, cache="memory")[1]
    assert "streamed by 2 workers: data.cache=none" in loader("items", cache="none", num_workers=2)[1]


def test_images_in_memory_keep_their_dtype_and_get_channels_last() -> None:
    files = made("files")
    held = cache.read_into_memory(Store(files), limit=None, workers=0, skip=False, on_progress=lambda *_: None)
    assert torch.equal(held.tensors[0], IMAGES)
    assert torch.equal(held.tensors[1], LABELS)
    assert held.tensors[0].dtype == torch.uint8
    assert held.tensors[0].is_contiguous(memory_format=torch.channels_last)


def test_the_arrays_of_a_torchvision_set_are_used_if_its_samples_equal_them() -> None:
    class Arrays(ItemDataset):
        def __init__(self, targets: Any, change: int = 0) -> None:
            super().__init__(lambda i: (Image.fromarray(self.data[i] + np.uint8(change)), int(LABELS[i])))
            self.data, self.targets = IMAGES[:, 0].numpy(), targets

    Arrays.__module__ = "torchvision.datasets.mnist"
    arrays = Arrays(LABELS.tolist())
    held = cache.torchvision_arrays(arrays)
    assert held is not None
    assert torch.equal(held[0], IMAGES[:, :1])
    assert arrays.reads < 5
    assert cache.torchvision_arrays(Arrays(LABELS.tolist(), change=1)) is None
    assert cache.torchvision_arrays(Arrays((LABELS + 1).tolist())) is None
    assert cache.torchvision_arrays(Arrays(torch.stack([LABELS] * 8, dim=1))) is None  # like those of QMNIST


@pytest.mark.parametrize("how", ["auto", "none"])
def test_attributes_of_a_custom_data_set_do_not_collide_with_those_of_trainkit(how: str) -> None:
    files = made("files")
    files.source, files.missing = "somewhere", 3
    with_own, without = (cache.make_store(dataset, how, CPU, **OPTIONS) for dataset in (files, made("files")))
    assert name_of(with_own.dataset, 2) == name_of(without.dataset, 2)
    assert build_data.describe_store(with_own) == build_data.describe_store(without)


OPTIONS: dict[str, Any] = {
    "limit": 2**30,
    "workers": 0,
    "skip": False,
    "partial": False,
    "on_progress": lambda *_: None,
}

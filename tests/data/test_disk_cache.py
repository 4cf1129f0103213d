"""Decoded samples come whole from disk or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.test_cache import made
from tests.helpers import COUNT, IMAGES, LABELS, ItemDataset, ReadSample, unreadable_samples
from trainkit.data import cache
from trainkit.data import disk_cache as decoded
from trainkit.data.loaders import CachedDataset


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a data set called `small`."""
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path))
    return tmp_path / "decoded" / "small.bin"


def hold(
    read: ReadSample = lambda i: (IMAGES[i], int(LABELS[i])), state: str = "one", skip: bool = False
) -> tuple[CachedDataset, Any]:
    items: Any = ItemDataset(read)
    items.cache_as = "small", state
    return cache.hold(items, limit=None, workers=0, skip=skip, on_progress=lambda *_: None), items


def test_a_decoded_set_is_read_from_disk_until_its_files_change(store: Path) -> None:
    first, read = hold()
    again, probed = hold()
    assert store.is_file()
    assert probed.reads == read.reads - 2 * COUNT  # neither for the first time nor once more
    for one, other in zip(first.tensors, again.tensors, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    changed, _ = hold(lambda i: (IMAGES[i] + 1, int(LABELS[i])), state="two")
    assert torch.equal(changed.tensors[0], IMAGES + 1)
    store.write_bytes(store.read_bytes()[:-5])
    assert torch.equal(hold(state="two")[0].tensors[0], IMAGES)


def test_a_set_with_unreadable_samples_is_not_kept(store: Path) -> None:
    assert set(hold(unreadable_samples(3), skip=True)[0].missing) == {3}
    assert not store.exists()


@pytest.mark.parametrize("fault", ["folder", "full"])
def test_a_disk_that_cannot_be_written_costs_nothing_but_the_file(
    store: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    if fault == "folder":
        store.parent.write_text("in the way")
    else:
        monkeypatch.setattr(os, "fsync", full)
    assert torch.equal(hold()[0].tensors[0], IMAGES)
    assert not store.is_file()
    assert not list(store.parent.parent.rglob("*.tmp"))


@pytest.mark.parametrize("mine", [True, ["a"]], ids=str)
def test_an_attribute_of_that_name_that_is_something_else_is_left_alone(mine: Any, store: Path) -> None:
    items: Any = made("items")
    items.cache_as = mine
    assert torch.equal(
        cache.hold(items, limit=None, workers=0, skip=False, on_progress=lambda *_: None).tensors[0], IMAGES
    )
    assert not store.parent.exists()


def loaded(file: Path, state: str, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """What `load` puts into room for samples like these."""
    room = torch.empty_like(like[0]), torch.empty_like(like[1])
    return room if decoded.load(file, state, room) else None


TARGETS = {
    "classes": torch.arange(5),
    "numbers": torch.rand(5, 2),
    "masks": torch.rand(5, 2, 8, 6),
    "grey masks": torch.rand(5, 1, 8, 6),
    "nothing": torch.zeros(5, 0),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_what_is_saved_is_loaded(targets: str, tmp_path: Path) -> None:
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.bool, torch.bfloat16):
        images = IMAGES[:5].to(dtype).contiguous(memory_format=torch.channels_last)
        for inputs in (
            images,
            images.flatten(1).contiguous(),
            images[:, 0, 0, 0].clone(),
            images[:, None].contiguous(),
        ):
            decoded.save(tmp_path / "a.bin", "state", (inputs, TARGETS[targets]))
            found = loaded(tmp_path / "a.bin", "state", (inputs, TARGETS[targets]))
            assert found is not None
            assert torch.equal(found[0], inputs)
            assert torch.equal(found[1], TARGETS[targets])


def damaged(content: bytes) -> Iterator[bytes]:
    yield from (content[:length] for length in range(len(content)))
    yield content + b"\0"
    for place in range(len(content)):
        for bit in range(8) if place < content.index(b"\n") + 9 or place > len(content) - 9 else [place % 8]:
            yield content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_a_file_torn_at_any_byte_or_with_any_bit_flipped_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    small = IMAGES[:4, :, :2, :2].contiguous(), LABELS[:4]
    decoded.save(file, "1 state", small)
    assert loaded(file, "1 state", small) is not None
    assert loaded(file, "2 state", small) is None
    assert loaded(file, "1 state", (small[0][:3], small[1][:3])) is None
    assert loaded(file, "1 state", (small[0].int(), small[1])) is None
    assert loaded(file, "1 state", (small[0].contiguous(memory_format=torch.channels_last), small[1])) is None
    for content in damaged(file.read_bytes()):
        file.write_bytes(content)
        assert loaded(file, "1 state", small) is None, content


def test_writers_at_the_same_time_leave_one_of_their_files_whole(tmp_path: Path) -> None:
    file = tmp_path / "decoded" / "a.bin"
    written = [(torch.full((5000, 3, 2, 2), value, dtype=torch.uint8), torch.arange(5000)) for value in range(4)]

    def write(value: int) -> None:
        for _ in range(4):
            decoded.save(file, "s", written[value])

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, value) for value in range(4)]
        while not all(writer.done() for writer in writers):
            found = loaded(file, "s", written[0]) if file.exists() else written[0]
            assert found is not None
            assert any(torch.equal(found[0], images) for images, _ in written)
    assert all(writer.exception() is None for writer in writers)
    assert [path.name for path in file.parent.iterdir()] == ["a.bin"]

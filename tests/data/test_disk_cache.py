"""Decoded samples are loaded from disk completely or not at all."""

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
from trainkit.core.pytree import tensors_in
from trainkit.data import cache
from trainkit.data import disk_cache as decoded
from trainkit.data.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache file of a data set named `small`."""
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path))
    return tmp_path / "decoded" / "small.bin"


def hold(
    read: ReadSample = lambda i: (IMAGES[i], int(LABELS[i])), state: str = "one", skip: bool = False
) -> tuple[Store, Any]:
    items: Any = ItemDataset(read)
    items.cache_as = "small", state
    return cache.read_into_memory(Store(items), limit=None, workers=0, skip=skip, on_progress=lambda *_: None), items


def test_decoded_samples_are_loaded_from_disk_until_the_files_change(store: Path) -> None:
    first, read = hold()
    again, probed = hold()
    assert store.is_file()
    assert probed.reads == read.reads - 2 * COUNT  # neither the first read nor the verification
    for one, other in zip(tensors_in(first.tensors), tensors_in(again.tensors), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    changed, _ = hold(lambda i: (IMAGES[i] + 1, int(LABELS[i])), state="two")
    assert torch.equal(changed.tensors[0], IMAGES + 1)
    store.write_bytes(store.read_bytes()[:-5])
    assert torch.equal(hold(state="two")[0].tensors[0], IMAGES)


def test_a_set_with_unreadable_samples_is_not_saved(store: Path) -> None:
    assert set(hold(unreadable_samples(3), skip=True)[0].unreadable) == {3}
    assert not store.exists()


@pytest.mark.parametrize("fault", ["folder", "full"])
def test_a_disk_that_cannot_be_written_does_not_stop_the_run(
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
def test_an_unrelated_attribute_named_cache_as_is_ignored(mine: Any, store: Path) -> None:
    items: Any = made("items")
    items.cache_as = mine
    assert torch.equal(
        cache.read_into_memory(Store(items), limit=None, workers=0, skip=False, on_progress=lambda *_: None).tensors[0],
        IMAGES,
    )
    assert not store.parent.exists()


def loaded(file: Path, state: str, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return what `load` reads into tensors of the same shape, None if it refuses the file."""
    tensors = torch.empty_like(like[0]), torch.empty_like(like[1])
    return tensors if decoded.load(file, state, tensors) else None


TARGETS = {
    "classes": torch.arange(5),
    "numbers": torch.rand(5, 2),
    "masks": torch.rand(5, 2, 8, 6),
    "grey masks": torch.rand(5, 1, 8, 6),
    "nothing": torch.zeros(5, 0),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_saved_tensors_are_loaded_unchanged(targets: str, tmp_path: Path) -> None:
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


def test_a_file_truncated_at_any_byte_or_with_any_bit_flipped_is_refused(tmp_path: Path) -> None:
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


def test_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
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

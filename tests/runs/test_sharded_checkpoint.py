"""Checkpoints whose tensors are written in shards: complete, verified, and read without a pickle."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.helpers import make_state
from trainkit.core.ranks import ALONE
from trainkit.core.shards import whole
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.checkpoint_files import MANIFEST, STATE, DamagedError, checksum, digest_file
from trainkit.runs.sharded_checkpoint import INDEX, gather_shards, map_shards, take_shards, write_shards
from trainkit.runs.snapshot import capture_state, digest

NAME = "step-00000000"
SHARD = "__0_0.distcp"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """Return a mesh of one process, whose tensors are sharded as those of several."""
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def written(mesh: Any, tmp_path: Path) -> tuple[Checkpoints, dict[str, Any]]:
    """Write a sharded checkpoint; return it, and the state as a plain checkpoint would hold it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    saved = capture_state(make_state(model, nn.MSELoss()), {"a": 1})
    names = {("model", "0.weight"), ("model", "1.bias")}

    def shard(value: Any, place: tuple[Any, ...] = ()) -> Any:
        if place in names:
            return distribute_tensor(value, mesh, [Shard(0)])
        if isinstance(value, dict):
            copied = type(value)((key, shard(item, (*place, key))) for key, item in value.items())
            copied.__dict__.update(getattr(value, "__dict__", {})) if place == ("model",) else None
            return copied
        return value

    content, shards = take_shards(shard(saved))
    assert set(shards) == names
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    pending = checkpoints.begin(content)
    assert pending is not None
    files, content[INDEX] = write_shards(pending.folder, shards, ALONE)
    checkpoints.finish(pending, content, files)
    return Checkpoints(checkpoints.directory), saved


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the content of the state, and write a manifest that fits, as an attacker could."""
    content = torch.load(folder / STATE, weights_only=True)
    change(content)
    torch.save(content, folder / STATE)
    renew_manifest(folder)


def renew_manifest(folder: Path) -> None:
    """Write the sizes and checksums of the present files into the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] = {name: digest_file(folder / name) for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": checksum(manifest)}))


def test_a_sharded_checkpoint_is_read_as_the_state_of_one_file(written: tuple[Checkpoints, dict[str, Any]]) -> None:
    checkpoints, saved = written
    loaded = checkpoints.load(NAME)
    assert digest(loaded) == digest(saved)
    assert [*loaded] == [*saved]
    assert [*loaded["model"]] == [*saved["model"]]
    assert loaded["model"]._metadata == saved["model"]._metadata


def test_other_tools_can_read_the_shards(written: tuple[Checkpoints, dict[str, Any]], tmp_path: Path) -> None:
    checkpoints, saved = written
    dcp_to_torch_save(checkpoints.directory / NAME, tmp_path / "whole.pt")
    tensors = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert tensors["model.0.weight"].equal(saved["model"]["0.weight"])


@pytest.mark.parametrize("name", [SHARD, ".metadata", STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "shorten", "delete"])
def test_a_damaged_file_is_found_before_its_content_is_read(
    written: tuple[Checkpoints, dict[str, Any]], name: str, damage: str
) -> None:
    checkpoints, _ = written
    file = checkpoints.directory / NAME / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[:-1] if damage == "shorten" else content)
    if damage == "delete":
        file.unlink()
    assert not checkpoints.is_valid(NAME)
    with pytest.raises(DamagedError):
        checkpoints.load(NAME)


def test_the_pickle_of_other_tools_is_never_read(written: tuple[Checkpoints, dict[str, Any]], tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "attacked"),)

    checkpoints, saved = written
    folder = checkpoints.directory / NAME
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    renew_manifest(folder)
    assert digest(checkpoints.load(NAME)) == digest(saved)
    assert not (tmp_path / "attacked").exists()


def _outside(content: dict[str, Any]) -> None:
    content[INDEX][0]["parts"][0]["file"] = "../../secret"


def _far(content: dict[str, Any]) -> None:
    content[INDEX][0]["parts"][0]["start"] += 10**6


def _huge(content: dict[str, Any]) -> None:
    content[INDEX][0]["shape"] = [10**6, 10**6]


def _negative(content: dict[str, Any]) -> None:
    content[INDEX][0]["shape"] = [-1, -35]


def _incomplete(content: dict[str, Any]) -> None:
    content[INDEX][0]["parts"] = []


def _taken(content: dict[str, Any]) -> None:
    content[INDEX][0]["place"] = ["model", "0.bias"]


def _no_list(content: dict[str, Any]) -> None:
    content[INDEX] = 3


@pytest.mark.parametrize("change", [_outside, _far, _huge, _negative, _incomplete, _taken, _no_list])
def test_an_index_that_does_not_fit_is_damage(
    written: tuple[Checkpoints, dict[str, Any]], change: Callable[[dict[str, Any]], None]
) -> None:
    checkpoints, _ = written
    rewrite(checkpoints.directory / NAME, change)
    with pytest.raises(DamagedError):
        checkpoints.load(NAME)


def test_a_foreign_file_in_the_manifest_is_damage(written: tuple[Checkpoints, dict[str, Any]]) -> None:
    checkpoints, _ = written
    folder = checkpoints.directory / NAME
    (folder / "more.pt").write_bytes(b"")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["more.pt"] = {"size": 0, "sha256": ""}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    renew_manifest(folder)
    with pytest.raises(DamagedError, match="other files"):
        checkpoints.load(NAME)


def test_shards_are_gathered_in_their_places(mesh: Any) -> None:
    tensor = torch.arange(6.0).reshape(3, 2)
    content = {"a": [1, {"b": distribute_tensor(tensor, mesh, [Shard(0)])}], "c": "text"}
    gathered = gather_shards(content)
    assert gathered["a"][1]["b"].equal(tensor)
    assert gathered["c"] == "text"
    places: list[Any] = []

    def note(place: tuple[Any, ...], shard: Tensor) -> Tensor:
        places.append(place)
        return whole(shard)

    map_shards(content, note)
    assert places == [("a", 1, "b")]

"""Checkpoints on disk: complete or absent, verified before they are read, and unable to run code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import loss_case, make_loader_of, make_state
from trainkit.core.errors import CheckpointError, StorageError
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.checkpoint_files import MANIFEST, STATE, DamagedError, checksum
from trainkit.runs.snapshot import capture_state, digest
from trainkit.training.loop import fit


def content(step: int = 1) -> dict[str, Any]:
    """Return the captured state of a small training after some steps."""
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    state = make_state(model, loss_fn, lr=0.1, optimizer=torch.optim.Adam(model.parameters()))
    fit(state, make_loader_of(inputs, targets, 16))
    state.progress.step = step
    return capture_state(state, {"config": {"lr": 0.1}})


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Return two checkpoints as another process sees them."""
    written = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        written.write(content(step))
    return Checkpoints(tmp_path / "checkpoints")


@pytest.mark.filterwarnings("error:Validating sparse tensor")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_buffer_is_saved_and_counts_in_the_digest(layout: torch.layout, tmp_path: Path) -> None:
    saved = content(7)
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    saved["model"]["adjacency"] = dense.to_sparse(layout=layout)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(saved)
    loaded = checkpoints.load("step-00000007")
    assert torch.equal(loaded["model"]["adjacency"].to_dense(), dense)
    assert digest(loaded) == digest(saved)
    for other in (dense + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), dense.T):  # other values, other indices
        saved["model"]["adjacency"] = other.to_sparse(layout=layout)
        assert digest(loaded) != digest(saved)


def test_a_checkpoint_is_a_directory_with_state_and_manifest_that_returns_what_was_written(
    tmp_path: Path,
) -> None:
    saved = content(7)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.write(saved) == "step-00000007"
    folder = tmp_path / "checkpoints" / "step-00000007"
    assert {file.name for file in folder.iterdir()} == {"state.pt", "manifest.json"}
    recorded = json.loads((folder / "manifest.json").read_text())["files"]["state.pt"]
    assert recorded["size"] == (folder / "state.pt").stat().st_size
    assert recorded["sha256"] == hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-00000007\n"
    assert digest(torch.load(folder / "state.pt", weights_only=True)) == digest(saved)
    assert digest(checkpoints.load("step-00000007")) == digest(saved)


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename, save = os.fsync, os.rename, torch.save

    def noted_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/dev/fd/{descriptor}').resolve().name}")
        fsync(descriptor)

    def noted_rename(old: Any, new: Any, **more: Any) -> None:
        calls.append(f"rename {Path(old).name} {Path(new).name}")
        rename(old, new, **more)

    def noted_save(*args: Any) -> None:
        save(*args)
        calls.append("written")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(torch, "save", noted_save)
    Checkpoints(tmp_path / "checkpoints").write(content(3))
    fresh = f".step-00000003.new-{os.getpid()}"
    assert calls[:6] == [
        "written",
        "fsync state.pt",
        "fsync manifest.json",
        f"fsync {fresh}",
        f"rename {fresh} step-00000003",
        "fsync checkpoints",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_kernel_sees_write_sync_rename_and_the_sync_of_the_directory(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom tests.runs.test_checkpoint import content\n"
        "from trainkit.runs.checkpoint import Checkpoints\nCheckpoints(Path('checkpoints')).write(content(3))\n"
    )
    trace = tmp_path / "trace"
    calls = "trace=openat,write,fsync,rename,renameat,renameat2"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", trace, sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=300,
    )
    lines = [line.partition(" ")[2].strip() for line in trace.read_text().splitlines() if "checkpoints" in line]

    def place(pattern: str) -> int:
        return next(number for number, line in enumerate(lines) if re.search(pattern, line))

    order = [
        place(r"write\(.*/state\.pt>"),
        place(r"fsync\(.*/state\.pt>"),
        place(r"write\(.*/manifest\.json>"),
        place(r"fsync\(.*/manifest\.json>"),
        place(r"fsync\([^/]*/[^>]*\.step-00000003\.new-\d+>"),
        place(r"rename.*\.new-\d+\", .*/step-00000003\""),
    ]
    assert order == sorted(order), lines
    assert any("fsync(" in line and "/checkpoints>" in line for line in lines[order[5] :])


# --------------------------------------------------------------------------------------------- damage


def damage(folder: Path, draw: random.Random) -> str:
    """Truncate a file of a checkpoint, or flip one of its bits."""
    file = folder / draw.choice([STATE, STATE, STATE, MANIFEST])
    whole = file.read_bytes()
    if draw.random() < 0.3:
        size = draw.randrange(len(whole))
        file.write_bytes(whole[:size])
        return f"{file.name} cut to {size}"
    place, bit = draw.randrange(len(whole)), draw.randrange(8)
    file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    return f"{file.name}: bit {bit} of byte {place} flipped"


def test_a_hundred_truncations_and_flipped_bits_are_found_before_anything_is_unpickled(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    newest = two.directory / "step-00000002"
    shutil.copytree(newest, two.directory / "whole")
    unpickled: list[str] = []
    load = torch.load

    def noted_load(file: Any, **how: Any) -> Any:
        unpickled.append(Path(f"/dev/fd/{file.fileno()}").resolve().parent.name)
        return load(file, **how)

    monkeypatch.setattr(torch, "load", noted_load)
    for _ in range(100):
        what = damage(newest, draw)
        name, saved, passed = two.newest()
        assert (name, saved["step"]) == ("step-00000001", 1), what
        assert len(passed) == 1, what
        assert passed[0].startswith("step-00000002: "), what
        for file in (STATE, MANIFEST):
            shutil.copy(two.directory / "whole" / file, newest / file)
    assert unpickled == ["step-00000001"] * 100
    assert two.newest()[0] == "step-00000002"


def test_only_damaged_checkpoints_are_a_checkpoint_error(two: Checkpoints) -> None:
    for name in two.names():
        damage(two.directory / name, random.Random(1))
    with pytest.raises(CheckpointError, match=r"step-00000002: .*; step-00000001: ") as caught:
        two.newest()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("file", [STATE, MANIFEST])
def test_a_missing_file_or_a_link_is_damage(file: str, two: Checkpoints, tmp_path: Path) -> None:
    path = two.directory / "step-00000002" / file
    path.rename(tmp_path / "elsewhere")
    assert two.newest()[0] == "step-00000001"
    path.symlink_to(tmp_path / "elsewhere")
    name, _, passed = two.newest()
    assert name == "step-00000001"
    assert f"{file} cannot be read" in passed[0]


@pytest.mark.parametrize("file", [STATE, MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_an_entry_that_is_not_a_regular_file_is_damage(file: str, kind: str, two: Checkpoints) -> None:
    path = two.directory / "step-00000002" / file
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    name, _, passed = two.newest()
    assert name == "step-00000001"
    assert f"{file} cannot be read: not a regular file" in passed[0]
    os.mkfifo(two.directory / "best")
    assert two.read_pointer("best") is None


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_an_entry_in_the_place_of_a_checkpoint_is_replaced(kind: str, two: Checkpoints, tmp_path: Path) -> None:
    path = two.directory / "step-00000003"
    (tmp_path / "elsewhere").mkdir()
    path.touch() if kind == "file" else path.symlink_to(tmp_path / ("nowhere" if "dangling" in kind else "elsewhere"))
    two.write({**two.load("step-00000002"), "step": 3})
    assert two.newest()[0] == "step-00000003"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {entry.name for entry in two.directory.iterdir()} == {*two.names(), "last"}


def test_nothing_is_written_through_links(two: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("as it was")
    for name in (".last.new", ".best.new", "best"):
        (two.directory / name).symlink_to(tmp_path / "precious")
    two.write({**two.load("step-00000002"), "step": 3})
    two.set_pointer("best", "step-00000003")
    assert (tmp_path / "precious").read_text() == "as it was"
    assert two.read_pointer("best") == "step-00000003"
    two.directory.rename(tmp_path / "moved")
    two.directory.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is a link"):
        two.newest()


def test_a_copy_under_the_name_of_another_step_is_damage(two: Checkpoints) -> None:
    shutil.copytree(two.directory / "step-00000002", two.directory / "step-99999999999")
    name, _, passed = two.newest()
    assert name == "step-00000002"
    assert passed == ["step-99999999999: its content is of step 2"]


def test_an_unplanned_checkpoint_is_not_used_for_rollback_and_does_not_replace_a_planned_one(tmp_path: Path) -> None:
    saved = content()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step, planned in ((1, True), (2, True), (3, False), (4, False)):
        checkpoints.write({**saved, "step": step}, planned=planned)
        checkpoints.prune(1)
    assert checkpoints.names() == ["step-00000004", "step-00000002"]
    assert checkpoints.newest()[0] == "step-00000004"
    assert checkpoints.newest(planned=True)[0] == "step-00000002"


def test_a_checkpoint_that_is_a_link_is_ignored(two: Checkpoints, tmp_path: Path) -> None:
    shutil.copytree(two.directory / "step-00000002", tmp_path / "outside")
    (two.directory / "step-00000009").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert two.names() == ["step-00000002", "step-00000001"]
    two.prune(1)
    assert (tmp_path / "outside" / STATE).exists()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def write_state(folder: Path, state: bytes) -> None:
    """Replace the state of a checkpoint, with a matching manifest."""
    (folder / STATE).write_bytes(state)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"][STATE] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": checksum(manifest)}))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(how: str, two: Checkpoints, tmp_path: Path) -> None:
    harmful = {**two.load("step-00000002"), "best": Harmful(tmp_path / "was here")}
    if how == "torch":
        torch.save(harmful, tmp_path / "harmful")
    else:
        (tmp_path / "harmful").write_bytes(pickle.dumps(harmful))
    write_state(two.directory / "step-00000002", (tmp_path / "harmful").read_bytes())
    name, _, passed = Checkpoints(two.directory).newest()
    assert name == "step-00000001"
    assert "more than tensors and plain containers" in passed[0]
    assert "\x1b" not in passed[0]
    assert not (tmp_path / "was here").exists()


def test_a_state_of_another_format_or_with_missing_keys_is_refused(two: Checkpoints, tmp_path: Path) -> None:
    whole = two.load("step-00000002")
    for changed, words in (
        ({**whole, "format": 99}, "its format is 99"),
        ({key: value for key, value in whole.items() if key not in ("rng", "ema")}, "ema, rng missing"),
    ):
        torch.save(changed, tmp_path / "changed")
        write_state(two.directory / "step-00000002", (tmp_path / "changed").read_bytes())
        with pytest.raises(CheckpointError, match=words):
            two.newest()


def test_pointers_name_an_existing_checkpoint_or_nothing(two: Checkpoints) -> None:
    assert two.read_pointer("last") == "step-00000002"
    assert two.read_pointer("best") is None
    for text in ("../../etc", "/etc/passwd", "step-00000007", "step-1", "step-00000001/../step-00000002", "\xff" * 9):
        (two.directory / "best").write_text(text)
        assert two.read_pointer("best") is None, text


# ------------------------------------------------------------------------------------------ how many


def test_the_newest_valid_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    saved = content()
    for step in range(1, 7):
        checkpoints.write({**saved, "step": step})
        if step == 2:
            checkpoints.set_pointer("best", "step-00000002")
        checkpoints.prune(2)
        assert len(checkpoints.names()) <= 3
    assert checkpoints.names() == ["step-00000006", "step-00000005", "step-00000002"]


def test_a_damaged_checkpoint_does_not_count_and_no_older_one_is_deleted(tmp_path: Path) -> None:
    saved = content()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in range(1, 5):
        checkpoints.write({**saved, "step": step})
    for name in ("step-00000003", "step-00000004"):
        damage(checkpoints.directory / name, random.Random(2))
    later = Checkpoints(checkpoints.directory)  # another process, which did not write them
    later.prune(1)
    assert later.names() == ["step-00000004", "step-00000003", "step-00000002"]
    later.write({**saved, "step": 4})  # replaces the damaged checkpoint
    assert later.load("step-00000004")["step"] == 4


def test_a_checkpoint_of_the_same_step_but_another_batch_is_replaced(two: Checkpoints) -> None:
    saved = two.load("step-00000002")
    inode = (two.directory / "step-00000002" / STATE).stat().st_ino
    two.write(saved)
    assert (two.directory / "step-00000002" / STATE).stat().st_ino == inode
    two.write({**saved, "epoch": saved["epoch"] + 1})
    assert two.load("step-00000002")["epoch"] == saved["epoch"] + 1
    assert {path.name for path in two.directory.iterdir()} == {"step-00000001", "step-00000002", "last"}


def test_the_leftovers_of_a_killed_process_are_cleaned_up(two: Checkpoints) -> None:
    shutil.copytree(two.directory / "step-00000002", two.directory / ".step-00000003.new-123")
    shutil.copytree(two.directory / "step-00000002", two.directory / ".step-00000001.deleted-123")
    (two.directory / "step-00000002").rename(two.directory / ".step-00000002.replaced-123")
    shutil.copytree(two.directory / "step-00000001", two.directory / ".step-00000001.replaced-123")
    (two.directory / ".best.new").touch()
    (two.directory / "mine").mkdir()
    assert two.names() == ["step-00000001"]
    two.clean()
    assert {path.name for path in two.directory.iterdir()} == {"step-00000002", "step-00000001", "last", "mine"}


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="step-00000001 cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints").write(content())


def test_a_damaged_checkpoint_is_never_loaded(two: Checkpoints) -> None:
    damage(two.directory / "step-00000002", random.Random(3))
    with pytest.raises(DamagedError):
        two.load("step-00000002")


def test_a_value_that_needs_pickle_is_refused_with_its_path() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"made": object()}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(CheckpointError, match=r"model._extra_state.made: a object cannot be stored"):
        capture_state(make_state(Odd(2, 2), nn.MSELoss()), {})

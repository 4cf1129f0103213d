"""The checkpoints of a run: written completely or not at all, verified before anything in them is read."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainkit.core.atomic import atomic_write_text, open_regular_file, remove, sync_directory
from trainkit.core.errors import CheckpointError, StorageError
from trainkit.core.paths import display_path
from trainkit.runs.checkpoint_files import (
    STATE,
    DamagedError,
    check_containers,
    checksum,
    read_manifest,
    verified_state,
    write_checkpoint_files,
)
from trainkit.runs.sharded_checkpoint import insert_shards
from trainkit.runs.snapshot import FORMAT, KEYS

NAME = re.compile(r"step-\d{8,}")
TEMPORARY = re.compile(r"\.(step-\d{8,}|last|best)\.(new|replaced|deleted).*")


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written.

    Attributes:
        name: the name that it gets.
        folder: its files, under a temporary name.
        facts: entries of its manifest.
    """

    name: str
    folder: Path
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: directories `step-<8 digits>`, and the files `last` and `best`, which name one each.

    A checkpoint holds `state.pt` and `manifest.json` (sizes and sha256, written last). It is written under a
    temporary name, synced to the disk, and renamed. So a checkpoint under its own name is complete.

    Args:
        directory: `checkpoints` in the directory of a run; the first write creates it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.valid: set[str] = set()  # names that this process wrote or verified

    def names(self) -> list[str]:
        """Return the names of all checkpoints, the newest first.

        Raises:
            CheckpointError: the directory is a link.
        """
        if self.directory.is_symlink():
            cause = f"{self.directory} is a link, and anybody may own its target"
            raise CheckpointError(cause, hint="move the checkpoints there, or move the whole run to another disk")
        if not self.directory.is_dir():
            return []
        found = [entry for entry in os.scandir(self.directory) if NAME.fullmatch(entry.name)]
        directories = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        return sorted(directories, key=step_of, reverse=True)

    # ------------------------------------------------------------------------------------- write

    def write(self, saved: Mapping[str, Any], *, planned: bool = True) -> str:
        """Write a checkpoint and point `last` at it; return its name.

        It replaces a checkpoint of the same step unless batch and fingerprint also match: then both are equal.

        Args:
            saved: the state that `snapshot.capture_state` returned.
            planned: whether the config decides the moment, as opposed to a signal or the clock.

        Raises:
            StorageError: the checkpoint cannot be written. Existing checkpoints are unchanged.
        """
        pending = self.begin(saved, planned=planned)
        if pending is not None:
            self.finish(pending, saved)
        return checkpoint_name(saved["step"])

    def begin(self, saved: Mapping[str, Any], *, planned: bool = True) -> Pending | None:
        """Make the folder of a new checkpoint; return None if an equal checkpoint exists. See `write`."""
        name = checkpoint_name(saved["step"])
        identity = {"step": saved["step"], "epoch": saved["epoch"], "batch": saved["batch"]}
        identity["fingerprint"] = checksum(saved["fingerprint"])
        if self.is_valid(name):
            manifest = read_manifest(self.directory / name)
            if identity.items() <= manifest.items():
                self.set_pointer("last", name)
                return None
            planned |= bool(manifest.get("planned"))  # its weights are equal
        pending = Pending(
            name, self.directory / f".{name}.new-{os.getpid()}", {"format": FORMAT, **identity, "planned": planned}
        )
        with self._reported(pending):
            self.directory.mkdir(exist_ok=True)
            pending.folder.mkdir()
        return pending

    def finish(self, pending: Pending, saved: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
        """Write the state and the manifest of a checkpoint, give it its name, and point `last` at it. See `write`.

        Args:
            pending: what `begin` returned.
            saved: the state.
            more: the files in the folder so far, see `write_checkpoint_files`.
        """
        path = self.directory / pending.name
        replaced = self.directory / f".{pending.name}.replaced-{os.getpid()}"
        with self._reported(pending):
            write_checkpoint_files(pending.folder, saved, pending.facts, more)
            if os.path.lexists(path):
                path.rename(replaced)  # after a crash at this point, `clean` renames it back
            pending.folder.rename(path)
            sync_directory(self.directory)
            remove(replaced)
        self.valid.add(pending.name)
        self.set_pointer("last", pending.name)

    def discard(self, pending: Pending | None) -> None:
        """Remove the files of a checkpoint that cannot be finished."""
        if pending is not None:
            shutil.rmtree(pending.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _reported(self, pending: Pending) -> Iterator[None]:
        """Raise a `StorageError` for any `OSError` of the block, and remove the folder."""
        try:
            yield
        except OSError as error:
            self.discard(pending)
            run = shlex.quote(display_path(self.directory.parent))
            raise StorageError(
                f"{self.directory / pending.name} cannot be written: {error.strerror or error}",
                hint=f"earlier checkpoints are unchanged: free space on the disk, then trainkit resume {run}",
            ) from error

    def set_pointer(self, pointer: str, name: str) -> None:
        """Let the file `last` or `best` name a checkpoint.

        Raises:
            StorageError: the file cannot be written.
        """
        if self.read_pointer(pointer) == name:
            return
        path = self.directory / pointer
        try:
            atomic_write_text(path, f"{name}\n", sync_folder=True)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error

    def drop_damaged_best(self) -> list[str]:
        """Remove the pointer `best` if its checkpoint is damaged; return a note about it."""
        name = self.read_pointer("best")
        if name is None or self.is_valid(name):
            return []
        (self.directory / "best").unlink(missing_ok=True)
        text = f"the weights of the best epoch, {name}, are damaged"
        return [f"note: {text}; `best` is missing until a better epoch"]

    def read_pointer(self, pointer: str) -> str | None:
        """Return the checkpoint that `last` or `best` names, or None."""
        try:
            with open_regular_file(self.directory / pointer) as file:
                text = file.read(64).decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if NAME.fullmatch(text) and text in self.names() else None

    # -------------------------------------------------------------------------------------- read

    def load(self, name: str) -> dict[str, Any]:
        """Return the content of a checkpoint in host memory. Its bytes are verified before they are interpreted.

        Raises:
            DamagedError: the checkpoint differs from what was written.
            CheckpointError: another version of trainkit wrote it.
        """
        path = self.directory / name
        with verified_state(path) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Validating sparse tensor")  # torch: it takes time
                    saved = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch and pickle raise errors of many types
                wanted = re.search(r"Unsupported (?:global|class|operand)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
                found = f" ({wanted[1]})" if wanted else ""
                raise DamagedError(f"{STATE} contains more than tensors and plain containers{found}") from error
        check_containers(saved, size)
        if not isinstance(saved, dict):
            raise DamagedError(f"{STATE} does not contain a dict")
        if type(saved.get("format")) is not int or saved["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: its format is {saved.get('format')!r}, this trainkit reads format {FORMAT}",
                hint="resume it with the trainkit that wrote it: see versions in run.json",
            )
        missing = [key for key in KEYS if key not in saved]
        if missing:
            raise CheckpointError(f"{path}: {', '.join(missing)} missing", hint="use another checkpoint")
        if saved["step"] != step_of(name):
            raise DamagedError(f"its content is of step {saved['step']!r}")
        files = read_manifest(path)["files"]
        saved = insert_shards(saved, path, {file: facts["size"] for file, facts in files.items() if file != STATE})
        self.valid.add(name)
        return saved

    def newest(self, *, planned: bool = False) -> tuple[str, dict[str, Any], list[str]]:
        """Return the newest valid checkpoint: its name, its content, and the damaged ones with reasons.

        Args:
            planned: consider only checkpoints whose moment the config decided.

        Raises:
            CheckpointError: no valid checkpoint exists.
        """
        damaged: list[str] = []
        for name in self.names():
            try:
                if planned and self.is_valid(name) and not read_manifest(self.directory / name).get("planned"):
                    continue
                return name, self.load(name), damaged
            except DamagedError as error:
                damaged.append(f"{name}: {error}")
        reason = f"no checkpoint can be used: {'; '.join(damaged)}" if damaged else "it holds no checkpoint"
        raise CheckpointError(f"{self.directory}: {reason}", hint="start a new run")

    def is_valid(self, name: str) -> bool:
        """Return whether a checkpoint exists and equals what was written."""
        if name not in self.valid and name in self.names():
            with contextlib.suppress(DamagedError), verified_state(self.directory / name):
                self.valid.add(name)
        return name in self.valid

    def checksum_of(self, name: str) -> str:
        """Return the sha256 of a checkpoint's manifest, which differs between checkpoints; "" if it is damaged."""
        return str(read_manifest(self.directory / name).get("sha256")) if self.is_valid(name) else ""

    # ------------------------------------------------------------------------------------ delete

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` valid checkpoints, the best one, and the newest planned one.

        Raises:
            StorageError: a checkpoint cannot be deleted.
        """
        best, kept, found_planned = self.read_pointer("best"), 0, False
        for name in self.names():
            valid = (kept < keep or not found_planned) and self.is_valid(name)
            newest_planned = False
            if valid and not found_planned:
                newest_planned = found_planned = bool(read_manifest(self.directory / name).get("planned"))
            if kept >= keep and name != best and not newest_planned:
                try:
                    self._delete(name)
                except OSError as error:
                    cause = f"{self.directory / name} cannot be deleted: {error.strerror or error}"
                    raise StorageError(cause, hint="allow its deletion, or write checkpoint.keep=1000") from error
            elif valid and kept < keep:
                kept += 1

    def delete_after(self, name: str) -> None:
        """Delete the checkpoints of later steps than `name`: a rollback has discarded these steps."""
        for later in self.names():
            if step_of(later) > step_of(name):
                self._delete(later)

    def clean(self) -> None:
        """Repair what a killed process left half written, half replaced or half deleted."""
        for path in list(self.directory.iterdir()) if self.directory.is_dir() else ():
            found = TEMPORARY.fullmatch(path.name)
            if found and found[2] == "replaced" and not (self.directory / found[1]).exists():
                path.rename(self.directory / found[1])
            elif found:
                remove(path)

    def _delete(self, name: str) -> None:
        old = self.directory / f".{name}.deleted-{os.getpid()}"
        (self.directory / name).rename(old)  # so that no incomplete checkpoint has its own name
        self.valid.discard(name)
        remove(old)


def checkpoint_name(step: Any) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """Return the step of a checkpoint, given its name."""
    return int(name.removeprefix("step-"))

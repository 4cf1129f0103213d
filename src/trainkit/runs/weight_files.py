"""Read the weights of a run, or of a `.pt` or `.safetensors` file. No code in the file is executed."""

from __future__ import annotations

import importlib
import os
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.core.extras import import_extra
from trainkit.core.paths import display_path
from trainkit.runs.checkpoint import Checkpoints, checkpoint_name, step_of
from trainkit.runs.checkpoint_files import STATE, DamagedError, check_archive, check_containers
from trainkit.runs.directory import Run
from trainkit.runs.find import checkpoint_step, newest_run_with
from trainkit.runs.frozen import AVERAGE
from trainkit.runs.lock import may_be_locked
from trainkit.runs.sharded_checkpoint import INDEX
from trainkit.runs.status import status_of
from trainkit.runs.untrusted import read_info

NESTED = ("state_dict", "model_state_dict", "model")  # entries of other tools' checkpoints that hold the weights
EXTRA_STATE = "_extra_state"  # the end of the name of an entry that may have any type
READ_ATTEMPTS, READ_PAUSE = 3, 0.2  # and the seconds between two attempts
SAVE_HINT = "save the weights alone: torch.save(model.state_dict(), PATH)"


def read_checkpoint(run: Run, checkpoint: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of a checkpoint of a run.

    Args:
        run: a saved run.
        checkpoint: `best`, `last`, or `step-N`.

    Raises:
        ConfigError: `checkpoint` is none of these.
        CheckpointError: the checkpoint is missing or damaged.
    """
    checkpoints = Checkpoints(run.directory / "checkpoints")
    if may_be_locked(run.directory):  # a training may replace or delete a checkpoint while it is read
        for _ in range(READ_ATTEMPTS - 1):
            with suppress(CheckpointError, DamagedError):
                name = find_checkpoint(checkpoints, checkpoint)
                return name, checkpoints.load(name)
            time.sleep(READ_PAUSE)
    name = find_checkpoint(checkpoints, checkpoint)
    try:
        return name, checkpoints.load(name)
    except DamagedError as error:
        hint = f"try the {'last' if checkpoint == 'best' else 'best'} checkpoint"
        raise CheckpointError(f"{display_path(checkpoints.directory / name)}: {error}", hint=hint) from error


def find_checkpoint(checkpoints: Checkpoints, checkpoint: str) -> str:
    """Return the name of the checkpoint that `best`, `last` or `step-N` means.

    Raises:
        ConfigError: `checkpoint` is none of these.
        CheckpointError: there is no such checkpoint. The hint lists those that exist. If the run failed or was
            stopped, the cause says why, and the hint names the newest run in `outputs` that has such a checkpoint.
    """
    step = checkpoint_step(checkpoint)
    names = checkpoints.names()
    name = checkpoints.read_pointer(checkpoint) if step is None else checkpoint_name(step)
    if name in names:
        return name
    steps = [f"step-{step_of(existing)}" for existing in names]
    hint = f"it has {', '.join(steps)}" if steps else "train at least one epoch of this run first"
    run = checkpoints.directory.parent
    cause = f"{display_path(run)} has no {checkpoint} checkpoint"
    ended = _why_it_ended(run) if step is None else ""
    if ended:
        cause += f": {ended}"
        newest = newest_run_with(checkpoint)
        hint += f"; the newest run that has one is {display_path(newest)}" if newest is not None else ""
    raise CheckpointError(cause, hint=hint)


def _why_it_ended(run: Path) -> str:
    """Return how a run failed or was stopped, and why; an empty text for other runs."""
    try:
        info = read_info(run / "run.json")
    except (CheckpointError, OSError):
        return ""
    status, why = status_of(run, info) if info else ("", "")
    text = " ".join(why.split())
    return {"failed": f"the run failed: {text}", "stopped": f"the run was stopped: {text}"}.get(status, "")


def weights_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the model in a checkpoint: with `ema`, their moving average."""
    if saved["ema"] is None:
        return dict(saved["model"])
    average = saved["ema"].items()
    return {name.removeprefix(AVERAGE): value for name, value in average if name.startswith(AVERAGE)}


def read_weights(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the state dict in a file, and notes about where it was found. The errors do not name the file.

    Raises:
        ConfigError: the file is missing, or its package is not installed.
        CheckpointError: the file is damaged, holds a pickle, or does not hold a state dict.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        content = read(path)
    except FileNotFoundError as error:
        raise ConfigError("there is no such file or directory", hint="write another path") from error
    except OSError as error:
        cause = f"it cannot be read: {error.strerror or error}"
        raise CheckpointError(cause, hint="name a regular file, or the directory of a run") from error
    if isinstance(content, Mapping) and content.get(INDEX) is not None:
        cause = "it belongs to a sharded checkpoint, whose tensors are in other files"
        raise CheckpointError(cause, hint="name the directory of the run")
    notes = []
    for _ in NESTED:  # an entry may hold another entry
        key = _nested_key(content)
        if key is not None:
            notes.append(f"the weights are the entry {key!r} of the file")
            content = content[key]
    return _checked_state_dict(content), notes


def _nested_key(content: Any) -> str | None:
    """Return the key of the entry that holds the weights; None if there is no such entry."""
    if not isinstance(content, Mapping):
        return None
    return next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)


def _checked_state_dict(content: Any) -> dict[str, Any]:
    """Return the content of a file if it is a state dict, a mapping of names to tensors.

    Raises:
        CheckpointError: the content is not a state dict.
    """
    if not isinstance(content, Mapping):
        cause = f"it holds a {type(content).__name__}, expected a state dict, which maps names to tensors"
        raise CheckpointError(cause, hint=SAVE_HINT)
    others = [key for key, value in content.items() if not _is_entry(key, value)]
    if others or not content:
        found = f"{others[0]!r} is of type {type(content[others[0]]).__name__}" if others else "it is empty"
        cause = f"it does not hold a state dict, which maps names to tensors: {found}"
        raise CheckpointError(cause, hint=SAVE_HINT)
    return {str(key): value for key, value in content.items()}


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith(EXTRA_STATE))


def _read_torch(path: Path) -> Any:
    """Return the content of a file that `torch.save` wrote."""
    with open_regular_file(path, follow_links=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CheckpointError("the file is empty", hint=SAVE_HINT)
        try:
            if file.read(4) == b"PK\3\4":  # an archive; torch before 1.6 wrote other files
                file.seek(0)
                check_archive(file, size)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
            check_containers(content, size)
        except DamagedError as error:
            cause = f"it is damaged: {str(error).replace(STATE, 'the file')}"
            raise CheckpointError(cause, hint="write another path") from error
        except Exception as error:  # torch and pickle raise errors of many types
            file.seek(0)
            raise _refusal(file.read(9), error) from error
    return content


def _refusal(start: bytes, error: Exception) -> CheckpointError:
    """Return the error for a file that torch does not load, because it is damaged or would execute code.

    Args:
        start: the first 9 bytes of the file.
        error: the error of torch.
    """
    if start[8:] == b"{":
        return CheckpointError("it is not a file of torch.save", hint="name the file *.safetensors if it is one")
    text = " ".join(str(error).split())
    named = re.search(r"[Uu]nsupported (?:global|class|GLOBAL)[^\w]*(?:GLOBAL )?([\w.]+)", text)
    if named or "unrecognized function" in text:
        name = f" of {named[1]}" if named else ""
        cause = f"it holds a pickle{name}, which could execute any code: it is refused"
        return CheckpointError(cause, hint=SAVE_HINT)
    if "TorchScript" in text:
        return CheckpointError("it is a TorchScript archive, which holds code: it is refused", hint=SAVE_HINT)
    cause = f"it is damaged, or torch did not save it, or it holds a pickle: {type(error).__name__}"
    return CheckpointError(cause, hint=SAVE_HINT)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the content of a safetensors file, whose format holds tensors only."""
    import_extra("safetensors", "safetensors", "init_from")
    library = importlib.import_module("safetensors.torch")
    with open_regular_file(path, follow_links=True) as file:
        content = file.read()
    try:
        loaded: dict[str, Tensor] = library.load(content)
    except Exception as error:
        cause = f"it is damaged: {' '.join(str(error).split())}"
        hint = "write another path"
        if content.startswith((b"PK", b"\x80")):
            cause, hint = "it is not a safetensors file", "name the file *.pt, because torch.save wrote it"
        raise CheckpointError(cause, hint=hint) from error
    return loaded

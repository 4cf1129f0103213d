"""Read the weights of a run, or of a `.pt` or `.safetensors` file, whoever wrote it: nothing in it is executed."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.core.extras import import_extra
from trainkit.core.paths import display_path
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.checkpoint_files import DamagedError, check_archive, check_containers
from trainkit.runs.directory import Run

NESTED = ("state_dict", "model_state_dict", "model")  # entries of a training's checkpoint that hold the weights
EXTRA_STATE = "_extra_state"  # the end of the name of an entry that may have any type
SAVE_HINT = "save the weights alone: torch.save(model.state_dict(), PATH)"


def read_checkpoint(run: Run, checkpoint: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the `best` or the `last` checkpoint of a run.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    checkpoints = Checkpoints(run.directory / "checkpoints")
    name = checkpoints.read_pointer(checkpoint)
    if name is None:
        raise CheckpointError(
            f"{run.directory} has no {checkpoint} checkpoint", hint="train at least one epoch of this run first"
        )
    try:
        return name, checkpoints.load(name)
    except DamagedError as error:
        raise CheckpointError(f"{checkpoints.directory / name}: {error}", hint="try checkpoint='last'") from error


def weights_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the model in a checkpoint: with `ema`, their moving average."""
    if saved["ema"] is None:
        return dict(saved["model"])
    prefix = "module.model."  # from AveragedModel and the ModuleDict of model and loss
    return {key.removeprefix(prefix): v for key, v in saved["ema"].items() if key.startswith(prefix)}


def read_weights(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the state dict in a file, and notes about where it was found.

    Raises:
        ConfigError: the file is missing, or its package is not installed.
        CheckpointError: the file is damaged, holds a pickle, or holds no state dict.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        content = read(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"init_from={display_path(path)}: there is no such file or directory", hint="write another path"
        ) from error
    except OSError as error:
        cause = f"{path} cannot be read: {error.strerror or error}"
        raise CheckpointError(cause, hint="init_from needs a regular file") from error
    notes = []
    for _ in NESTED:
        key = next(
            (key for key in NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None
        )
        if key is None:
            break
        notes.append(f"the weights are the entry {key!r} of the file")
        content = content[key]
    return _checked_state_dict(content, path), notes


def _checked_state_dict(content: Any, path: Path) -> dict[str, Any]:
    """Return a state dict: a mapping of names to tensors.

    Raises:
        CheckpointError: the content is not a state dict.
    """
    if not isinstance(content, Mapping):
        found = f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {found}, expected a state dict: names with tensors", hint=SAVE_HINT)
    others = [key for key, value in content.items() if not _is_entry(key, value)]
    if others or not content:
        found = f"{others[0]!r} is of type {type(content[others[0]]).__name__}" if others else "it is empty"
        raise CheckpointError(f"{path} holds no state dict, which has names with tensors: {found}", hint=SAVE_HINT)
    return {str(key): value for key, value in content.items()}


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith(EXTRA_STATE))


def _read_torch(path: Path) -> Any:
    """Return the content of a file that `torch.save` wrote."""
    with open_regular_file(path, follow_links=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CheckpointError(f"{path} is empty", hint=SAVE_HINT)
        try:
            if file.read(4) == b"PK\3\4":  # torch wrote no archives before 1.6
                file.seek(0)
                check_archive(file, size)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
            check_containers(content, size)
        except DamagedError as error:
            raise CheckpointError(f"{path} is damaged: {error}", hint="write another path") from error
        except Exception as error:  # torch and pickle raise errors of many types
            raise _refusal(path, error) from error
    return content


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file that torch cannot load without executing code."""
    text = " ".join(str(error).split())
    named = re.search(r"[Uu]nsupported (?:global|class|GLOBAL)[^\w]*(?:GLOBAL )?([\w.]+)", text)
    if named or "unrecognized function" in text:
        name = f" of {named[1]}" if named else ""
        cause = f"{path} holds a pickle{name}, which could execute any code: it is refused"
        return CheckpointError(cause, hint=SAVE_HINT)
    cause = f"{path} is damaged, or torch did not save it, or it holds a pickle: {type(error).__name__}"
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
        cause = f"{path} is damaged: {' '.join(str(error).split())}"
        raise CheckpointError(cause, hint="write another path") from error
    return loaded

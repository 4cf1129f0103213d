"""The format `safetensors`: the weights, with the config of the model as metadata."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import CheckpointError, ConfigError, ExportError
from trainkit.core.extras import import_extra
from trainkit.core.paths import display_path
from trainkit.runs.weight_files import read_weights

MODEL, TIED = "model", "tied"  # metadata: the config of the model, and the tensors that share their values
MAX_HEADER = 100_000_000  # bytes, as in the library


def check_packages() -> None:
    """Raise `ConfigError` if the package is not installed."""
    import_extra("safetensors", "safetensors", "--format safetensors")


def write(state: Mapping[str, Any], tied: Mapping[str, str], file: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights of a model, which `untie` returned.

    Raises:
        ExportError: the state contains more than dense tensors.
        OSError: the file cannot be written.
    """
    others = [name for name, value in state.items() if not _is_dense(value)]
    if others:
        cause = f"model: {others[0]} is of type {type(state[others[0]]).__name__}, and a safetensors file holds tensors"
        raise ExportError(cause, hint="write --format torch, or remove get_extra_state from the model")
    library = importlib.import_module("safetensors.torch")
    header = {"format": "pt", **metadata} | ({TIED: json.dumps(tied)} if tied else {})
    try:
        content = library.save(dict(state), header)
    except Exception as error:  # such as a dtype that the format lacks
        raise ExportError(f"model: its weights cannot be written: {error}", hint="write --format torch") from error
    file.write_bytes(content)


def check(model: nn.Module, file: Path) -> None:
    """Raise `ExportError` if a file does not hold the weights of a model bit by bit."""
    weights = with_tied(read_weights(file)[0], read_metadata(file))
    own = model.state_dict()
    wrong = [name for name, value in own.items() if name not in weights or not _equal(weights[name], value)]
    if wrong or weights.keys() != own.keys():
        name = (wrong or sorted(weights.keys() - own.keys()))[0]
        raise ExportError(f"{file.name}: {name} differs from the model", hint="the disk may be damaged: check it")


def untie(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the state of a model with each tensor once, and the further names of tensors: name -> written name.

    Tensors that share only a part of their memory are copied.
    """
    state: dict[str, Any] = {}
    tied: dict[str, str] = {}
    written: dict[Any, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not _is_dense(value):
            state[name] = value
            continue
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if place in written:
            tied[name] = written[place]
        else:
            written[place] = name
            state[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return state, tied


def with_tied(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a file with the further names of its tensors."""
    tied = metadata.get(TIED, {})
    return {**weights, **{name: weights[first] for name, first in tied.items() if first in weights}}


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the config of the model and the tied tensors in the metadata of a file, if it has them.

    Raises:
        ConfigError: the file is missing.
        CheckpointError: the file is damaged.
    """
    shown = display_path(file)
    try:
        with open_regular_file(file, follow_links=True) as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= MAX_HEADER:
                raise ValueError("its header has an impossible size")
            found = json.loads(opened.read(size)).get("__metadata__", {})
        read = {name: json.loads(found[name]) for name in (MODEL, TIED) if name in found}
        if not all(isinstance(value, dict) for value in read.values()):
            raise ValueError("its metadata is not that of an export")
    except FileNotFoundError as error:
        raise ConfigError(f"{shown}: there is no such file", hint="write another path") from error
    except OSError as error:
        cause = f"{shown} cannot be read: {error.strerror or error}"
        raise CheckpointError(cause, hint="name a regular file") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        hint = "export the model again"
        raise CheckpointError(f"{shown} is damaged: {' '.join(str(error).split())[:200]}", hint=hint) from error
    return read


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _equal(found: Tensor, value: Any) -> bool:
    """Return whether two tensors have the same bits; NaN equals NaN."""
    same = isinstance(value, Tensor) and found.shape == value.shape and found.dtype == value.dtype
    return same and bool(torch.equal(_bits(found), _bits(value)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

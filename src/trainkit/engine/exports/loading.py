"""Load the model of an export: `trainkit.load("model.safetensors")` and `trainkit.load("model.pt2")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from torch import nn

from trainkit.adapters import merge
from trainkit.build.model import build_model
from trainkit.config.static_targets import find_missing_target
from trainkit.config.targets import nodes_with_target
from trainkit.core.errors import CheckpointError, ConfigError, Problem
from trainkit.core.paths import display_path
from trainkit.core.rng import preserve_rng
from trainkit.engine.exports.graph import quiet
from trainkit.engine.exports.safetensors import MODEL, read_metadata, with_tied
from trainkit.engine.exports.trusted import find_untrusted
from trainkit.runs.reload import redacted_keys
from trainkit.runs.weight_files import read_weights
from trainkit.training.carried import carrying_modules, match_saved_buffers, reset_carried

TRUST = "trust=True"


def load_export(file: Path, overrides: Sequence[str] = (), *, trust: bool = False) -> nn.Module:
    """Return the model of an exported file on the CPU, in evaluation mode.

    Args:
        file: a `.safetensors` or a `.pt2` file.
        overrides: values that a `.safetensors` file lacks, such as secrets: `["model.token=…"]`.
        trust: call any code that the file names. Otherwise only models of torch, torchvision, timm and trainkit are
            built, and no `.pt2` file is read, because torch executes code in it.

    Raises:
        ConfigError: the file is missing or of another kind, needs `trust`, or lacks a secret.
        CheckpointError: the file is damaged, or its weights belong to another model.
        UserCodeError: the model raised an error.
    """
    shown = display_path(file)
    if not file.is_file():
        raise ConfigError(f"{shown}: there is no such file", hint="write another path")
    if file.suffix == ".onnx":
        hint = "open it with onnxruntime.InferenceSession, or export with --format torch or safetensors"
        raise ConfigError(f"{shown}: torch does not load ONNX files", hint=hint)
    if file.suffix == ".pt2":
        return _load_program(file, trust=trust)
    metadata = read_metadata(file)
    if MODEL not in metadata:
        hint = "build the model, and load the weights with safetensors.torch.load_model; a run takes them by init_from"
        raise ConfigError(f"{shown} holds weights without the config of a model", hint=hint)
    node = _with_overrides(metadata[MODEL], overrides)
    refused = [] if trust else list(find_untrusted(metadata[MODEL]))
    if refused:
        hint = f"if you trust the file, write trainkit.load({str(file)!r}, {TRUST})"
        raise ConfigError(*(Problem(f"{shown}: {reason}", hint) for reason in refused))
    weights = with_tied(read_weights(file)[0], metadata)
    return fill(build(node, shown), weights, shown)


def build(node: Mapping[str, Any], name: str) -> nn.Module:
    """Build the model of a config, without low-rank adapters; lazy layers stay lazy.

    Raises:
        ConfigError: a `_target_` does not exist here.
        UserCodeError: the model raised an error.
    """
    for path, inner in nodes_with_target(node, "model"):
        problem = find_missing_target(inner["_target_"])
        if problem is not None:
            raise ConfigError(f"{name}: {path}: {problem.cause}", hint=problem.hint or "install the package")
    with preserve_rng():
        return merge(build_model(dict(node), torch.device("cpu")))


def fill(model: nn.Module, weights: Mapping[str, Any], name: str) -> nn.Module:
    """Load weights into a model that was just built; return it in evaluation mode.

    Raises:
        CheckpointError: the weights belong to another model.
    """
    try:
        match_saved_buffers(model, weights)
        model.load_state_dict(dict(weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        cause = f"{name} belongs to another model: {' '.join(str(error).split())}"
        raise CheckpointError(cause, hint="use the code that the model was exported with") from error
    reset_carried(carrying_modules(model))
    return model.eval()


def _load_program(file: Path, *, trust: bool) -> nn.Module:
    shown = display_path(file)
    if not trust:
        hint = f"if you trust the file, write trainkit.load({str(file)!r}, {TRUST})"
        raise ConfigError(f"{shown}: a .pt2 file holds a program, which torch reads with pickle", hint=hint)
    try:
        with quiet():
            module: nn.Module = torch.export.load(file).module()
    except Exception as error:  # torch raises errors of many types
        cause = f"{shown} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(cause, hint="export the model again, with this version of torch") from error
    return module


def _with_overrides(node: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config of a model with values changed, such as secrets.

    Raises:
        ConfigError: an override is wrong, or a secret is missing.
    """
    root = {"model": node}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text}: not of the form KEY=VALUE", hint="write model.KEY=VALUE") from error
        *above, leaf = override.key_or_group.split(".")
        inner: Any = root
        for key in above:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if not above or not isinstance(inner, dict) or leaf not in inner:
            raise ConfigError(f"{text}: the config of the model has no such key", hint="write model.KEY=VALUE")
        inner[leaf] = override.value()
    missing = redacted_keys(root)
    if missing:
        hint = f"give it again: overrides=['{missing[0]}=VALUE']"
        raise ConfigError(*(Problem(f"{key}: the value is a secret, and the file lacks it", hint) for key in missing))
    return root["model"]

"""What an export starts from: the model of a run, and what the files of the run say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainkit.adapters import merge
from trainkit.config.schema import Node
from trainkit.config.settings import Settings
from trainkit.core.errors import DataError, UserCodeError
from trainkit.data.prepare import Prepare
from trainkit.engine.exports.nodes import plain_node
from trainkit.engine.load import load
from trainkit.engine.preprocessing import preprocessing_of_run, restore_prepare
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.checkpoint_files import read_manifest
from trainkit.runs.directory import Run
from trainkit.runs.preprocessing import Preprocessing, is_tensor
from trainkit.runs.reload import reload_config
from trainkit.runs.weight_files import find_checkpoint


@dataclass(frozen=True)
class Source:
    """The model of a run, and what an export says about it.

    Attributes:
        run: the run.
        settings: with the secrets that were given again.
        checkpoint: the name of the checkpoint, step-<8 digits>.
        epoch: the number of epochs that were complete; None: the checkpoint was written inside an epoch.
        model: with merged adapters, in evaluation mode, on the CPU.
        preprocessing: from a raw input to the inputs of the model; None: an older run, whose data is gone.
    """

    run: Run
    settings: Settings
    checkpoint: str
    epoch: int | None
    model: nn.Module
    preprocessing: Preprocessing | None

    @property
    def node(self) -> Node:
        """The config that builds the model, without trainkit's wrappers."""
        return plain_node(self.settings.model)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics of the epoch of the checkpoint."""
        return next((row for row in self.run.history if row.get("epoch") == self.epoch), {})

    def sample(self) -> Any:
        """Return the raw inputs of a sample as tensors without values; None if they are not known."""
        return None if self.preprocessing is None else _without_values(self.preprocessing.inputs)

    def prepare(self) -> Prepare:
        """See `restore_prepare`."""
        return restore_prepare(self.preprocessing, torch.device("cpu"))


def read_source(run: Run, checkpoint: str, overrides: Sequence[str] = ()) -> Source:
    """Load the model of a run.

    Args:
        run: the run.
        checkpoint: `best`, `last` or `step-N`.
        overrides: config values that are not saved, such as secrets.

    Raises:
        ConfigError: the config is wrong, or lacks a secret.
        CheckpointError: the checkpoint or another file of the run is missing or damaged.
    """
    settings = reload_config(run, overrides, secrets_under="model").settings
    settings = settings.with_data(classes=run.info.get("classes"))
    checkpoints = Checkpoints(run.directory / "checkpoints")
    name = find_checkpoint(checkpoints, checkpoint)  # a running training may write another in between
    model = merge(load(run, name, overrides))
    preprocessing = None
    with suppress(DataError, UserCodeError):  # the data of a run of an earlier version is gone
        preprocessing = preprocessing_of_run(run, settings)
    manifest = read_manifest(checkpoints.directory / name)
    epoch = manifest.get("epoch") if manifest.get("batch") == 0 else None
    return Source(run, settings, name, epoch, model, preprocessing)


def _without_values(inputs: Any) -> Any:
    """Return tensors of the device `meta` for a description of inputs; None if an input is not a tensor."""
    if is_tensor(inputs):
        dtype = getattr(torch, inputs["dtype"], None)
        return torch.empty(inputs["shape"], dtype=dtype, device="meta") if isinstance(dtype, torch.dtype) else None
    if isinstance(inputs, dict | list):
        keys = inputs.keys() if isinstance(inputs, dict) else range(len(inputs))
        parts = {key: _without_values(inputs[key]) for key in keys}
        if any(part is None for part in parts.values()):
            return None
        return parts if isinstance(inputs, dict) else tuple(parts.values())
    return None

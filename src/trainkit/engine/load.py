"""Load the model of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainkit.build.model import build_model
from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError
from trainkit.core.rng import preserve_rng, seed_all
from trainkit.engine.warm_start import prepare_warm_start
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.frozen import check_frozen, lacks_frozen, with_frozen
from trainkit.runs.reload import reload_config
from trainkit.runs.weight_files import read_checkpoint, weights_of
from trainkit.training.carried import carrying_modules, match_saved_buffers, reset_carried

SUFFIXES = (".safetensors", ".pt2", ".onnx")  # of exported files


def load(
    run: Run | Path | str, checkpoint: str = "best", overrides: Sequence[str] = (), *, trust: bool = False
) -> nn.Module:
    """Return the model of a run or of an exported file, in evaluation mode on the CPU.

    If the run was trained with `ema`, the model has the averaged weights.

    For a run, this calls the code that its config names, so load only runs that you trust.

    Args:
        run: a run, its directory, or `last` for the newest run; or a `.safetensors` or `.pt2` file of an export.
        checkpoint: of a run: `best`, `last` for the newest checkpoint, or `step-N`.
        overrides: config values that are not saved, such as secrets: `["model.hub_token=…"]`.
        trust: of an exported file: call any code that the file names; see docs/export.md.

    Raises:
        ConfigError: `checkpoint` is none of these, or the config has an error.
        CheckpointError: the checkpoint is missing or damaged, or belongs to another model.
    """
    if not isinstance(run, Run) and Path(run).suffix in SUFFIXES and not Path(run).is_dir():
        from trainkit.engine.exports.loading import load_export

        return load_export(Path(run).expanduser(), overrides, trust=trust)
    run = run if isinstance(run, Run) else Run.load(find_run(str(run)))
    return load_checkpoint(run, checkpoint, overrides).model


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, in evaluation mode on the CPU.

    Attributes:
        model: the model.
        checkpoint: the name of the checkpoint.
        settings: the settings of the run, with the number of classes.
        machine: the facts about the machine of the training in the checkpoint, whose types are not checked.
    """

    model: nn.Module
    checkpoint: str
    settings: Settings
    machine: Mapping[str, Any]


def load_checkpoint(run: Run, checkpoint: str = "best", overrides: Sequence[str] = ()) -> LoadedModel:
    """Return the model of a checkpoint with the settings of its run; see `load`."""
    name, saved = read_checkpoint(run, checkpoint)
    settings = reload_config(run, overrides, secrets_under="model").settings
    settings = settings.with_data(classes=run.info.get("classes"))
    with preserve_rng():
        if lacks_frozen(saved):
            seed_all(settings.seed, deterministic=torch.are_deterministic_algorithms_enabled())
        model = build_model(settings.model, torch.device("cpu"))
    if lacks_frozen(saved):
        if any(map(is_lazy, model.parameters())):
            cause = f"{name} lacks the frozen weights, and the lazy layers of the model need data to build them again"
            raise CheckpointError(
                cause, hint="resume the run with checkpoint.weights=all, and load its last checkpoint"
            )
        warm_start = prepare_warm_start(settings)[1]
        if warm_start is not None:
            warm_start(model)
        check_frozen(model, saved)
        saved = with_frozen(model, saved)
    weights = weights_of(saved)
    match_saved_buffers(model, weights)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        hint = "use the code that the run was trained with"
        raise CheckpointError(f"{name} belongs to another model: {text}", hint=hint) from error
    reset_carried(carrying_modules(model))
    machine = saved["fingerprint"].get("machine") if isinstance(saved.get("fingerprint"), Mapping) else None
    return LoadedModel(model.eval(), name, settings, machine if isinstance(machine, Mapping) else {})

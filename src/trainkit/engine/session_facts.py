"""What is told of a session: to its user, in `run.json`, and in the fingerprint of its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from trainkit.build.session import Session
from trainkit.config.settings import Settings
from trainkit.data.contents import data_facts
from trainkit.data.split import split_notes
from trainkit.display.text import count, param_group_table
from trainkit.runs.fingerprint import fingerprint
from trainkit.runs.frozen import frozen_names
from trainkit.training.objects import takes_batch_statistics
from trainkit.training.sync_batchnorm import is_synced


def session_facts(session: Session) -> dict[str, Any]:
    """Return the entries of `run.json` about the device, the model and the data."""
    sizes = [(row["count"], row["trainable"]) for row in session.params]
    return {
        "device": str(session.state.objects.device),
        "ranks": session.state.objects.ranks.size,
        "parameters": sum(count for count, _ in sizes),
        "trainable_parameters": sum(count for count, trainable in sizes if trainable),
        "train_samples": session.train.samples,
        "val_samples": session.val.samples if session.val is not None else 0,
        "classes": session.settings.data.classes,
    }


def session_fingerprint(session: Session) -> dict[str, Any]:
    """Return what the numbers of a run depend on: config and data exactly, the machine up to rounding."""
    state = session.state
    return {
        "config": fingerprint(session.settings),
        "epochs": session.settings.epochs,
        "steps": session.settings.steps,
        "data": data_facts(session.train, "training")
        | ({} if session.val is None else data_facts(session.val, "validation")),
        "machine": {
            "device": state.objects.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "micro_batch": session.settings.micro_batch,
            "memory_format": str(session.train.prepare.memory_format).removeprefix("torch.").removesuffix("_format"),
            "compile": session.settings.compile or "off",
            "ranks": state.objects.ranks.size,
        },
    }


def keeps_trainable(settings: Settings) -> bool:
    """Return whether the checkpoints hold only the weights that are trained."""
    return settings.checkpoint is not None and settings.checkpoint.weights == "trainable"


def startup_notes(session: Session, overrides: Sequence[str] = ()) -> list[str]:
    """Return the lines about a training that a user sees before it starts.

    Args:
        session: that is about to be trained.
        overrides: the overrides of the command line.
    """
    state, notes = session.state, split_notes(overrides, held_out=session.held_out)
    layers = [module for module in state.objects.model.modules() if takes_batch_statistics(module)]
    ranks = state.objects.ranks
    if state.progress.micro_batch is not None and layers:
        size = state.progress.micro_batch * (ranks.size if state.objects.synced else 1)
        notes.append(f"note: {count(len(layers), 'layer')} with batch statistics see {size} samples at a time")
    unsynced = [layer for layer in layers if not is_synced(layer)] if ranks.are_several else []
    if unsynced:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in unsynced}))
        text = f"note: {count(len(unsynced), 'layer')} with batch statistics ({kinds}) see the share of each rank"
        notes.append(f"{text}, so the results depend on the number of ranks")
    if any(not param.requires_grad for layer in layers for param in layer.parameters(recurse=False)):
        notes.append("note: frozen batch norm layers still update their running statistics")
    if keeps_trainable(session.settings):
        names = frozen_names(state)
        size = sum(session.named[name].numel() for name in names)
        text = f"checkpoints do not hold the {size:,} frozen parameters: a resume builds them again from the config"
        notes.append(
            text if names else "note: checkpoint.weights=trainable leaves out no parameter, as none stays frozen"
        )
    for group in session.groups:
        if (state.epochs or math.inf) <= group.frozen_epochs:
            notes.append(
                f"note: param group {group.name} stays frozen, because the run has {count(state.epochs or 0, 'epoch')}"
            )
    ema = session.settings.ema
    if ema is not None and session.val is not None:
        notes.append(f"note: val/… is of the averaged weights, over about {1 / (1 - ema):,.0f} steps")
    groups = param_group_table(session.params, [group.name for group in session.groups])
    return [*session.notes, *groups, *notes]

"""Apply the key `activation_checkpointing`."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.optim.layers import model_blocks
from trainkit.training.recompute import recompute_blocks


def apply_activation_checkpointing(settings: Settings, model: nn.Module) -> str | None:
    """Let the backward pass compute the blocks of the model again; return a note, None if the key is off.

    Raises:
        ConfigError: the model has no blocks, or its blocks are scripted.
    """
    if settings.activation_checkpointing is None:
        return None
    blocks, key = model_blocks(model), "activation_checkpointing=blocks"
    if not blocks:
        cause = (
            f"{key}: {type(model).__name__} has no stack of blocks, which are modules of one class in an nn.Sequential"
        )
        raise ConfigError(f"{cause} or nn.ModuleList", hint="write activation_checkpointing=off, or micro_batch=N")
    if any(isinstance(block, torch.jit.ScriptModule) for block in blocks):
        cause = f"{key}: the blocks of {type(model).__name__} are scripted, so they cannot be called twice"
        raise ConfigError(cause, hint="write activation_checkpointing=off")
    recompute_blocks(blocks)
    kinds = ", ".join(f"{count} {kind.__name__}" for kind, count in Counter(map(type, blocks)).items())
    return f"activation checkpointing: the backward pass computes again {kinds}"

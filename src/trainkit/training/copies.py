"""Copies of modules and batches, with which a check can compute without a change of the training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainkit.core.pytree import map_tensors


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose calls do not change the module.

    Raises:
        ValueError: a forward hook is a function that may hold the module itself. A copy would share it.
    """
    for inner in module.modules():
        for hook in (*inner._forward_hooks.values(), *inner._forward_pre_hooks.values()):
            if getattr(hook, "__closure__", None) and hook.__module__ != "trainkit.training.first_batch":
                raise ValueError(f"a forward hook of {type(inner).__name__} holds objects that a copy would share")
    return copy.deepcopy(module)


def clone_tensors(batch: Any) -> Any:
    """Return a batch whose tensors are copies, because a model or a loss may change its arguments in place."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


@contextmanager
def without_fast_attention() -> Iterator[None]:
    """Turn off torch's fast path of attention in the block, because it changes the shapes of padded sequences."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def set_evaluation_mode(model: nn.Module, *, only_torch: bool) -> nn.Module:
    """Set layers of a copied model to evaluation mode, and return the model.

    Args:
        model: the copied model.
        only_torch: set only the layers of torch, such as batch norm and dropout, and not custom layers.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            module.eval()
        norm_or_dropout = isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd)
        if not only_torch or norm_or_dropout or type(module).__module__.startswith("torch.nn."):
            module.training = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            # Without running statistics, batch norm uses batch statistics in evaluation mode, too.
            module.running_mean = torch.zeros(module.num_features, device=next(model.parameters()).device)
            module.running_var = torch.ones_like(module.running_mean)
    return model

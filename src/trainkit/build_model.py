"""Config to model and loss, and how the model is laid out and compiled."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from trainkit import device
from trainkit.batches import map_tensors
from trainkit.errors import ConfigError, TrainkitError, UserCodeError
from trainkit.instantiate import call
from trainkit.loaders import Loader


def build_model(node: DictConfig, train: Loader | None, where: torch.device) -> nn.Module:
    """The model, on its device: one `_target_`, or named children applied in order.

    Lazy layers take their shapes from the first training batch; without data they stay lazy.
    """
    if "_target_" in node:
        model = call(node, "model")
    else:
        model = nn.Sequential()
        for name in map(str, node):
            model.add_module(name, _module(call(node[name], f"model.{name}"), f"model.{name}"))
    model = _module(model, "model").to(where)
    lazy = any(is_lazy(p) for p in model.parameters()) or any(isinstance(m, LazyModuleMixin) for m in model.modules())
    if train is not None and lazy:
        training, _ = model.training, model.eval()
        try:
            with torch.no_grad():
                model(train.example())  # shapes are all that is wanted
        except TrainkitError:
            raise
        except Exception as error:
            raise UserCodeError("model", error) from error
        model.train(training)
    return model


def lay_out(model: nn.Module, asked: str, loaders: list[Loader]) -> str | None:
    """Lay out the model and the images it is given as `memory_format` says; tells where auto chose channels last.

    Convolutions are faster so, where they can be: a model that calls `view` on images cannot take them,
    so auto tries a sample.
    """
    convolutions = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    if asked == "contiguous" or (asked == "auto" and not convolutions):
        return None
    for layout in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=layout)
        for loader in loaders:
            loader.prepare.memory_format = layout
        if layout is torch.channels_last and (asked != "auto" or not refuses(model, loaders[0])):
            break
    else:
        return None
    return f"images with channels last, for {convolutions} convolutions" if asked == "auto" else None


@torch.no_grad()
def refuses(model: nn.Module, loader: Loader) -> bool:
    """Whether the model fails on a sample as it is laid out, and not on the same one laid out plainly."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training, _ = model.training, model.eval()
    try:
        with device.random_state_kept():
            example = loader.example()
            try:
                model(example)
            except RuntimeError:
                model.to(memory_format=torch.contiguous_format)
                model(map_tensors(example, lambda tensor: tensor.contiguous()))
                return True
    except Exception:  # whatever else is wrong, the training tells of it
        return False
    finally:
        model.train(training)
        for buffer, before in kept:
            buffer.copy_(before)
    return False


def _module(made: Any, path: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{path}: {type(made).__name__} is no torch.nn.Module", mend="name a module class")
    return made


def build_loss(node: DictConfig) -> nn.Module:
    """The loss; lists given for `weight` and `pos_weight` become tensors, as torch wants them."""
    tensors = {}
    for key in ("weight", "pos_weight"):
        value = list(node[key]) if OmegaConf.is_list(node.get(key)) else node.get(key)
        if isinstance(value, list | int | float):
            tensors[key] = torch.tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
    return _module(call(node, "loss", **tensors), "loss")

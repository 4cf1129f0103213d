"""Config to model and loss, and how the model is laid out and compiled."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from trainkit.build.instantiate import call_target
from trainkit.core.errors import ConfigError, TrainkitError, UserCodeError
from trainkit.core.pytree import map_tensors
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader


def build_model(node: DictConfig, train: Loader | None, where: torch.device) -> nn.Module:
    """The model, on its device: one `_target_`, or named children applied in order.

    Lazy layers take their shapes from the first training batch; without data they stay lazy.
    """
    if "_target_" in node:
        model = call_target(node, "model")
    else:
        model = nn.Sequential()
        for name in map(str, node):
            model.add_module(name, _module(call_target(node[name], f"model.{name}"), f"model.{name}"))
    model = _module(model, "model").to(where)
    lazy = any(is_lazy(p) for p in model.parameters()) or any(isinstance(m, LazyModuleMixin) for m in model.modules())
    if train is not None and lazy:
        training, _ = model.training, model.eval()
        try:
            with torch.no_grad():
                model(train.example()[0])  # shapes are all that is wanted
        except TrainkitError:
            raise
        except Exception as error:
            raise UserCodeError("model", error) from error
        model.train(training)
    return model


def apply_memory_format(
    model: nn.Module, loss_fn: nn.Module, asked: str, loaders: list[Loader], where: torch.device
) -> str | None:
    """Lay out the model and the images it is given as `memory_format` says; tells what came of it.

    Convolutions are faster so, where they can be: a model or a loss that calls `view` on maps cannot
    take them, so auto tries a sample. On the CPU weights stay contiguous, as optimizers may want them:
    oneDNN lays them out anew in any case.
    """
    convolutions = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    volumes = any(param.dim() == 5 for param in model.parameters())
    if asked == "contiguous" or (asked == "auto" and (not convolutions or volumes)):
        return None
    if asked == "auto" and not supports_channels_last(model, loss_fn, loaders[0], where):
        return "images contiguous: model or loss does not take channels last (reshape in place of view would)"
    if where.type != "cpu":
        model.to(memory_format=torch.channels_last)
    for loader in loaders:
        loader.prepare.memory_format = torch.channels_last
    return f"images with channels last, for {convolutions} convolution{'s' * (convolutions != 1)}"


def supports_channels_last(model: nn.Module, loss_fn: nn.Module, loader: Loader, where: torch.device) -> bool:
    """Whether copies of model and loss take a sample with channels last, if they take it at all."""

    def takes(layout: torch.memory_format) -> bool:
        parts = copy.deepcopy(nn.ModuleDict({"model": model, "loss": loss_fn}))
        twin = parts["model"] if where.type == "cpu" else parts["model"].to(memory_format=layout)
        images = map_tensors(inputs, lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t)
        try:
            with torch.no_grad():
                parts.eval()["loss"](twin(images), targets)
            parts.train()
            loss = parts["loss"](twin(images), targets)
            if loss.requires_grad:
                loss.backward()
        except Exception:
            return False
        return True

    try:
        inputs, targets = loader.example()
        with preserve_rng(), redirect_stdout(io.StringIO()):
            return takes(torch.channels_last) or not takes(torch.contiguous_format)
    except Exception:  # it cannot be copied, or no sample can be read, of which the training tells
        return False


def _module(made: Any, path: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{path}: {type(made).__name__} is no torch.nn.Module", hint="name a module class")
    return made


def build_loss(node: DictConfig) -> nn.Module:
    """The loss; lists given for `weight` and `pos_weight` become tensors, as torch wants them."""
    tensors = {}
    for key in ("weight", "pos_weight"):
        value = list(node[key]) if OmegaConf.is_list(node.get(key)) else node.get(key)
        if isinstance(value, list | int | float):
            tensors[key] = torch.tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
    return _module(call_target(node, "loss", **tensors), "loss")

"""Build the model and the loss, and choose the memory format of images."""

from __future__ import annotations

import copy
import inspect
import io
from collections import OrderedDict
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from trainkit.build.instantiate import call_target
from trainkit.config.schema import UNNAMED, Node, key_path, named_nodes
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError, TrainkitError, UserCodeError
from trainkit.core.pytree import map_tensors
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader
from trainkit.training.state import needs_closure


def build_model(node: Node, train: Loader | None, device: torch.device) -> nn.Module:
    """Build the model on its device.

    Args:
        node: one `_target_`, or several named children, which become an `nn.Sequential`.
        train: gives lazy layers their shapes. Lazy layers stay lazy without it.
        device: for the parameters.

    Raises:
        ConfigError: an object is not an `nn.Module`.
        UserCodeError: a constructor, or the forward pass of lazy layers, raised an error.
    """
    parts = {}
    for name, child in named_nodes(node).items():
        parts[name] = _module(call_target(child, key_path("model", name)), key_path("model", name))
    model = (parts[UNNAMED] if UNNAMED in parts else nn.Sequential(OrderedDict(parts))).to(device)
    lazy = any(is_lazy(p) for p in model.parameters()) or any(isinstance(m, LazyModuleMixin) for m in model.modules())
    if train is not None and lazy:
        training, _ = model.training, model.eval()
        try:
            with torch.no_grad():
                model(train.example()[0])
        except TrainkitError:
            raise
        except Exception as error:
            raise UserCodeError("model", error) from error
        model.train(training)
    return model


def build_loss(node: Node) -> nn.Module:
    """Build the loss. Numbers and lists in `weight` and `pos_weight` become tensors."""
    tensors = {}
    for key in ("weight", "pos_weight"):
        value = node.get(key)
        if isinstance(value, list | int | float):
            tensors[key] = torch.tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
    return _module(call_target(node, "loss", **tensors), "loss")


def choose_memory_format(settings: Settings, device: torch.device) -> tuple[str, str | None]:
    """Return the memory format to apply, and the reason if `auto` became contiguous.

    On an accelerator, weights and gradients use the memory format too. `auto` therefore becomes contiguous for
    optimizers that flatten gradients (LBFGS) and for optimizers from outside torch.

    Raises:
        ConfigError: the optimizer does not support `channels_last`.
    """
    if device.type == "cpu":
        return settings.memory_format, None
    makers = [locate(node["_target_"]) for node in settings.optim.values()]
    classes = [maker for maker in makers if inspect.isclass(maker) and issubclass(maker, Optimizer)]
    flattening = [cls for cls in classes if needs_closure(cls)]
    if flattening and settings.memory_format == "channels_last":
        cause = f"memory_format=channels_last: {flattening[0].__name__} needs contiguous gradients"
        raise ConfigError(cause, hint="write memory_format=auto")
    foreign = [maker for maker in makers if maker not in classes or not maker.__module__.startswith("torch.optim.")]
    if settings.memory_format != "auto" or not (flattening or foreign):
        return settings.memory_format, None
    name = getattr((flattening or foreign)[0], "__name__", "the optimizer")
    reason = f"images contiguous: {name} may need it; if it does not, write memory_format=channels_last"
    return "contiguous", None if flattening else reason


def apply_memory_format(
    model: nn.Module, loss_fn: nn.Module, asked: str, loaders: list[Loader], device: torch.device
) -> str | None:
    """Apply a memory format to the model and to the images of the loaders; return a note for the log.

    `auto` tests one sample, because a model or loss that calls `view` on feature maps fails with channels_last.
    Weights stay contiguous on the CPU: oneDNN reorders them in any case, and some optimizers need it.
    """
    convolutions = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    volumes = any(param.dim() == 5 for param in model.parameters())
    if asked == "contiguous" or (asked == "auto" and (not convolutions or volumes)):
        return None
    if asked == "auto" and not supports_channels_last(model, loss_fn, loaders[0], device):
        return "images contiguous: model or loss does not support channels_last (use reshape instead of view)"
    if device.type != "cpu":
        model.to(memory_format=torch.channels_last)
    for loader in loaders:
        loader.prepare.memory_format = torch.channels_last
    return f"images in channels_last, for {convolutions} convolution{'s' * (convolutions != 1)}"


def supports_channels_last(model: nn.Module, loss_fn: nn.Module, loader: Loader, device: torch.device) -> bool:
    """Return whether copies of model and loss accept a sample in channels_last.

    Returns True also if they accept no sample at all: the training then reports the error.
    """

    def accepts(memory_format: torch.memory_format) -> bool:
        parts = copy.deepcopy(nn.ModuleDict({"model": model, "loss": loss_fn}))
        twin = parts["model"] if device.type == "cpu" else parts["model"].to(memory_format=memory_format)
        images = map_tensors(inputs, lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t)
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
            return accepts(torch.channels_last) or not accepts(torch.contiguous_format)
    except Exception:  # the model cannot be copied, or a sample cannot be read, which the training reports
        return False


def _module(made: Any, path: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{path}: {type(made).__name__} is not a torch.nn.Module", hint="name a module class")
    return made

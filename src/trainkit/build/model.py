"""Build the model and the loss."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from trainkit.build.instantiate import call_target
from trainkit.config.schema import UNNAMED, Node, key_path, named_nodes
from trainkit.config.targets import is_loss_function, locate
from trainkit.core.errors import ConfigError, TrainkitError, UserCodeError
from trainkit.data.loaders import Loader
from trainkit.losses import loss_from_function


def build_model(node: Node, device: torch.device) -> nn.Module:
    """Build the model on its device; lazy layers stay lazy.

    Args:
        node: one `_target_`, or several named children, which become an `nn.Sequential`.
        device: the device of the parameters.

    Raises:
        ConfigError: an object is not an `nn.Module`.
        UserCodeError: a constructor raised an error.
    """
    parts = OrderedDict()
    for name, child in named_nodes(node).items():
        path = key_path("model", name)
        parts[name] = _check_module(call_target(child, path), path)
    return (parts[UNNAMED] if UNNAMED in parts else nn.Sequential(parts)).to(device)


def initialize_lazy_layers(model: nn.Module, train: Loader) -> None:
    """Run a model with lazy layers on an example of the training data, from which they infer their shapes.

    Raises:
        UserCodeError: the forward pass raised an error.
    """
    if not any(map(is_lazy, model.parameters())) and not any(isinstance(m, LazyModuleMixin) for m in model.modules()):
        return
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(train.example()[0])
    except TrainkitError:
        raise
    except Exception as error:
        raise UserCodeError("model", error) from error
    model.train(mode)


def build_loss(node: Node) -> nn.Module:
    """Build the loss. Numbers and lists in `weight` and `pos_weight` become tensors.

    A `_target_` may be a class, a function that makes a loss, or a function of (outputs, targets).

    Raises:
        ConfigError: the result is not a loss.
        UserCodeError: the constructor raised an error.
    """
    tensors = {}
    for key in ("weight", "pos_weight"):
        value = node.get(key)
        if isinstance(value, list | int | float):
            tensors[key] = torch.tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
    target = locate(node["_target_"])
    if isinstance(target, nn.Module):  # a loss that a module holds
        return target
    if not is_loss_function(target, node):
        loss = call_target(node, "loss", **tensors)
        is_function = callable(loss) and not isinstance(loss, nn.Module | type)
        return loss_from_function(loss, {}) if is_function else _check_module(loss, "loss")
    given = functools.partial(target).keywords  # of a partial function, which Hydra repeats

    def build(*_: Any, **arguments: Any) -> nn.Module:
        return loss_from_function(target, {key: value for key, value in arguments.items() if key not in given})

    return _check_module(call_target(node, "loss", build, **tensors), "loss")


def _check_module(module: Any, path: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        cause = f"{path}: {type(module).__name__} is not a torch.nn.Module"
        raise ConfigError(cause, hint=f"write the dotted path of a torch.nn.Module class: {path}._target_=PATH")
    return module

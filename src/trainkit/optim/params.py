"""The parameters of a model and its loss, by name."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainkit.core.errors import ConfigError
from trainkit.optim.layers import model_layers


@dataclass(eq=False)
class Param:
    """A parameter under one of its names (a tied parameter has several), and the options that rules set.

    Attributes:
        name: the dotted name, with the prefix `loss.` for a parameter of the loss.
        tensor: the parameter.
        owner: the module that owns the parameter.
        layer: the number of the layer, counted from the input.
        height: the number of layers above this layer: 0 is the last layer.
        rule_options: the options that rules set for this parameter.
        decided_by: for each of these options, the name of the rule that set it.
    """

    name: str
    tensor: nn.Parameter
    owner: nn.Module
    layer: int
    height: int
    rule_options: dict[str, Any] = field(default_factory=dict)
    decided_by: dict[str, str] = field(default_factory=dict)

    @property
    def frozen(self) -> bool:
        """Whether the parameter is never trained."""
        return not self.tensor.requires_grad or self.rule_options.get("freeze") is True

    @property
    def frozen_epochs(self) -> int:
        """The number of epochs before the parameter is trained."""
        return int(self.rule_options.get("freeze") or 0)


def named_params(model: nn.Module, loss_fn: nn.Module | None = None) -> list[Param]:
    """Return all parameters of the model, then those of the loss as `loss.*`, each under all its names.

    Raises:
        ConfigError: a parameter of the model has the same name as a parameter of the loss.
    """
    layers = model_layers(model)
    layer_of = {id(p): number for number, layer in enumerate(layers) for p in layer}
    last = len(layers) - 1
    found = []
    for prefix, root in (("", model), ("loss.", loss_fn)):
        for path, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            assert root is not None
            for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
                name = prefix + (f"{path}.{leaf}" if path else leaf)
                layer = layer_of.get(id(tensor), last)  # the loss belongs to the last layer
                owner = root.get_submodule(re.split(r"\.?parametrizations\b", path)[0])  # owner of the computed weight
                found.append(Param(name, tensor, owner, layer, last - layer))
    duplicates = [name for name, count in Counter(param.name for param in found).items() if count > 1]
    if duplicates:
        cause = f"model: {duplicates[0]} is a parameter of the model and of the loss"
        raise ConfigError(cause, hint="rename the model's module: the prefix `loss.` is reserved for the loss")
    return found

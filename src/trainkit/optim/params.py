"""The parameters of a model and of its loss, by name."""

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
    """A parameter under one of its names (a tied one has several), and what the rules decide for it.

    `layer` counts from the input, `height` from the head: 0 is the last layer.
    """

    name: str
    tensor: nn.Parameter
    owner: nn.Module
    layer: int
    height: int
    fields: dict[str, Any] = field(default_factory=dict)
    decided_by: dict[str, str] = field(default_factory=dict)

    @property
    def frozen(self) -> bool:
        """Whether it takes no part in training."""
        return not self.tensor.requires_grad or bool(self.fields.get("freeze"))


def named_params(model: nn.Module, loss_fn: nn.Module | None = None) -> list[Param]:
    """Every parameter of the model, and of the loss as `loss.*`, under each of its names.

    Raises:
        ConfigError: a name of the model's is one of the loss's.
    """
    order = model_layers(model)
    depth = {id(p): number for number, layer in enumerate(order) for p in layer}
    last = len(order) - 1
    found = []
    for prefix, root in (("", model), ("loss.", loss_fn)):
        for path, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            assert root is not None
            for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
                name = prefix + (f"{path}.{leaf}" if path else leaf)
                layer = depth.get(id(tensor), last)  # the loss is as near the end as the head
                owner = root.get_submodule(re.split(r"\.?parametrizations\b", path)[0])  # whose weight is computed
                found.append(Param(name, tensor, owner, layer, last - layer))
    twice = [name for name, count in Counter(param.name for param in found).items() if count > 1]
    if twice:
        hint = "name the model's module otherwise: loss.* are the loss's"
        raise ConfigError(f"model: {twice[0]} is a parameter of the model and of the loss", hint=hint)
    return found

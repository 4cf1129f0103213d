"""Low-rank adapters (LoRA): train a small change of some weights, and freeze all other parameters of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainkit.core.errors import ConfigError

ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class LowRank(nn.Module):
    """Adds a product of two small matrices to a weight: W + alpha / rank * up @ down. The product starts at 0.

    A weight with more than two dimensions is treated as a matrix with a row for each output.

    Args:
        weight: the weight to adapt.
        rank: the number of columns of `up` and of rows of `down`.
        alpha: the scale of the change. It makes the learning rate independent of the rank.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        if rank < 1:
            raise ConfigError(f"model.rank={rank}: must be at least 1", hint="for example model.rank=4")
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight + self.scale * (self.up @ self.down).view(weight.shape)


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    modules: str = ".*",
    train: Sequence[str] = (),
) -> nn.Module:
    """Return a model with an adapter on the weights of its linear, convolution and embedding layers.

    All other parameters are frozen. `init_from` loads the weights of the plain model.

    Args:
        model: the model, which is changed in place.
        rank: the rank of the adapters.
        alpha: the scale of the change.
        modules: a regular expression for the whole names of the layers that get an adapter.
        train: regular expressions for the whole names of parameters that are trained as usual, such as the parameters
            of a new head. The layers of these parameters get no adapter.

    Raises:
        ConfigError: no layer matches, or a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    trained = {name for name in names if any(re.fullmatch(pattern, name) for pattern in train)}
    unused = [pattern for pattern in train if not any(re.fullmatch(pattern, name) for name in names)]
    if unused:
        cause = f"model.train: no parameter matches the pattern {unused[0]}"
        raise ConfigError(cause, hint=f"a parameter is, for example, {names[-1] if names else 'fc.weight'}")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ADAPTED)]
    adapted = [layer for name, layer in layers if re.fullmatch(modules, name) and f"{name}.weight" not in trained]
    if not adapted:
        available = ", ".join(name for name, _ in layers[:5])
        cause = f"model.modules={modules}: no layer to adapt matches"
        raise ConfigError(cause, hint=f"the layers are {available}" if layers else "the model has no linear layer")
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained)
    for layer in adapted:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add each adapter to its weight, in place, so that the model has the layers and the names of the plain model."""
    for layer in list(model.modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        parts: Any = layer.parametrizations
        if any(isinstance(part, LowRank) for part in parts["weight"]):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model

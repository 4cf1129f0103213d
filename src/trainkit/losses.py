"""Losses that configs name, besides those of torch, and functions as losses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

# The functions of torch's losses, whose modules have the same arguments.
MODULES = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.kl_div: nn.KLDivLoss,
}

REGRESSION_LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
FLOAT_TARGET_LOSSES = (*REGRESSION_LOSSES, nn.BCELoss, nn.BCEWithLogitsLoss)


class Identity(nn.Module):
    """A loss for models whose output is the loss itself: the mean of the output, whatever its shape."""

    def forward(self, outputs: Tensor, targets: object) -> Tensor:  # noqa: ARG002
        """Return the mean of `outputs`; `targets` are ignored."""
        return outputs.mean()


class FunctionLoss(nn.Module):
    """A function of (outputs, targets) as a loss.

    The attributes `reduction`, `whole_batch` and `denominator` of the function are those of the loss.

    Args:
        function: returns a number, a scalar tensor.
        arguments: further arguments of the function; tensors among them become buffers.
    """

    def __init__(self, function: Callable[..., Tensor], /, **arguments: Any) -> None:
        super().__init__()
        self.wrapped_function = function
        self.arguments = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        self.tensors = [name for name in arguments if name not in self.arguments]
        for name in self.tensors:
            self.register_buffer(name, arguments[name])
        self.reduction = arguments.get("reduction", getattr(function, "reduction", "mean"))
        self.whole_batch: bool | None = getattr(function, "whole_batch", None)
        self.denominator: Callable[..., Any] | None = getattr(function, "denominator", None)

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch."""
        tensors = {name: getattr(self, name) for name in self.tensors}
        return self.wrapped_function(outputs, targets, **self.arguments, **tensors)


def loss_from_function(function: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    """Return a function as a loss. The functions in `MODULES` become their modules, which have exact denominators."""
    if isinstance(function, functools.partial) and function.func in MODULES and not function.args:
        return loss_from_function(function.func, {**function.keywords, **arguments})
    module = MODULES.get(function)
    if module is None or not arguments.keys() <= inspect.signature(module).parameters.keys():
        return FunctionLoss(function, **arguments)
    loss: nn.Module = module(**arguments)
    return loss

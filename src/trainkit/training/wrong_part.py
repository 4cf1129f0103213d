"""The error for a part of the training whose results train to wrong numbers, or do not train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.core.pytree import describe


class WrongPartError(Exception):
    """A part of the training returns something that trains to wrong numbers, or does not train.

    Args:
        part: `model`, `loss`, `data.train`, `training_step` or `evaluation_step`.
        cause: what was found, and what was expected.
        hint: the fix.
    """

    def __init__(self, part: str, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.part, self.cause, self.hint = part, cause, hint


def check_loss_value(loss: Any, part: str = "loss") -> None:
    """Raise `WrongPartError` if a loss is not a number that is differentiable where gradients are enabled."""
    hint = "return one number as a tensor, such as errors.mean()"
    if isinstance(loss, float | int):
        cause = f"it returns a Python {type(loss).__name__}, which has no gradient; expected a tensor with one element"
        raise WrongPartError(part, cause, "remove .item() or float()")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        if isinstance(loss, Mapping):
            hint = f"return one of them, such as [{next(iter(loss), 'loss')!r}], or their sum"
        raise WrongPartError(part, f"it returns {describe(loss)}, expected a tensor with one element", hint)
    if not loss.is_floating_point():
        raise WrongPartError(part, f"it returns {describe(loss)}, expected a float tensor", hint)
    if torch.is_grad_enabled() and not loss.requires_grad:
        cause = "its value does not depend on a trainable parameter, so there is no gradient"
        raise WrongPartError(part, cause, "remove .detach(), .data, .item() and torch.no_grad() from model and loss")

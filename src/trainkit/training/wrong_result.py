"""The error for a result of a model, loss, data set or custom step that trains to wrong numbers, or does not train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.core.pytree import describe


class WrongResultError(Exception):
    """An object of the config returns something that trains to wrong numbers, or does not train.

    Args:
        key: the config key of the object: `model`, `loss`, `data.train`, `training_step` or `evaluation_step`.
        cause: what was found, and what was expected.
        hint: the fix.
    """

    def __init__(self, key: str, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.key, self.cause, self.hint = key, cause, hint


def check_loss_value(loss: Any, key: str = "loss") -> None:
    """Raise `WrongResultError` if a loss is not a tensor with one element, or has no gradient in training."""
    hint = "return one number as a tensor, such as errors.mean()"
    if isinstance(loss, float | int):
        cause = f"it returns a Python {type(loss).__name__}, which has no gradient; expected a tensor with one element"
        raise WrongResultError(key, cause, "remove .item() or float()")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        if isinstance(loss, Mapping):
            hint = f"return one of them, such as [{next(iter(loss), 'loss')!r}], or their sum"
        raise WrongResultError(key, f"it returns {describe(loss)}, expected a tensor with one element", hint)
    if not loss.is_floating_point():
        raise WrongResultError(key, f"it returns {describe(loss)}, expected a float tensor", hint)
    if torch.is_grad_enabled() and not loss.requires_grad:
        cause = "its value does not depend on a trainable parameter, so there is no gradient"
        raise WrongResultError(key, cause, "remove .detach(), .data, .item() and torch.no_grad() from model and loss")

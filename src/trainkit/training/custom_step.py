"""A custom training or evaluation step: the call of the user's code, and the check of its result.

`custom_training` trains and evaluates with these steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import describe
from trainkit.core.source import name_and_place, without_partial
from trainkit.training.progress import Progress
from trainkit.training.wrong_result import WrongResultError, check_loss_value

ARGUMENTS = ("model", "inputs", "targets", "loss_fn")
RESERVED = frozenset({"loss_sum", "samples", "skipped", "scale"})  # trainkit's own names of training metrics


@dataclass(frozen=True)
class StepProgress:
    """The counts of the training that a step gets as `progress`.

    Attributes:
        epoch: epochs done.
        step: optimizer updates done.
        batch: batches of this epoch done.
        batches: batches of a whole epoch.
    """

    epoch: int
    step: int
    batch: int
    batches: int


@dataclass(frozen=True)
class StepResult:
    """The checked result of a step for a batch or a micro batch.

    Attributes:
        loss: a scalar, the mean over `denominator`.
        denominator: None if the step does not return a denominator.
        outputs: the outputs for the metrics; None if the step does not return outputs.
        scalars: name -> value and denominator. If the denominator is None, it is the denominator of the loss.
    """

    loss: Tensor
    denominator: Tensor | int | None = None
    outputs: Any = None
    scalars: dict[str, tuple[Tensor, Tensor | int | None]] = field(default_factory=dict)


class CustomStep:
    """The step of a user: a function of (model, inputs, targets, loss_fn), or an object with such a `__call__`.

    Args:
        key: `training_step` or `evaluation_step`.
        function: the function or the object. If it has a parameter `progress`, it gets a `StepProgress`.

    Attributes:
        is_generator: whether the step yields a loss for each optimizer.
        takes_progress: whether the step has a parameter `progress`.
        returns_denominator: whether the last result had a denominator; None before the first result.
    """

    def __init__(self, key: str, function: Any) -> None:
        self.key, self.function = key, function
        code = function if inspect.isroutine(function) else getattr(function, "func", type(function).__call__)
        self.is_generator = inspect.isgeneratorfunction(code)
        try:
            self.takes_progress = "progress" in inspect.signature(function).parameters
        except (TypeError, ValueError):  # compiled code has no signature
            self.takes_progress = False
        self.returns_denominator: bool | None = None

    @property
    def place(self) -> str:
        """The name of the step, and where it is defined."""
        return name_and_place(without_partial(self.function), "__call__")

    @property
    def whole_batch(self) -> bool:
        """Whether the step declares that its batches may not be split."""
        declaring = self.function if hasattr(self.function, "whole_batch") else without_partial(self.function)
        return getattr(declaring, "whole_batch", None) is True

    @property
    def may_split(self) -> bool:
        """Whether a batch may be split into micro batches. Before the first result, this is not known for certain."""
        return not self.whole_batch and not self.is_generator and self.returns_denominator is not False

    def split_error(self, micro_batch: int | None) -> ConfigError | None:
        """Return the error for a `micro_batch` that the step does not support; None if it supports it."""
        if self.may_split:
            return None
        hint = "write micro_batch=off, and a batch_size that fits into memory"
        if self.is_generator:
            reason = "updates the weights several times, so its batch may not be split"
        elif self.whole_batch:
            reason = "has whole_batch = True"
        else:
            reason = "returns no denominator, so it is unknown how the losses of micro batches add up"
            entries = "{'loss': loss, 'denominator': len(targets)}"
            hint = f"return {entries} for a mean over samples; or write micro_batch=off"
        return ConfigError(f"micro_batch={micro_batch}: {self.key}: {self.place} {reason}", hint=hint)

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, loss_fn: nn.Module, progress: Progress) -> Any:
        """Return what the user's step returns."""
        if not self.takes_progress:
            return self.function(model, inputs, targets, loss_fn)
        counts = StepProgress(progress.epoch, progress.step, progress.batch, progress.batches)
        return self.function(model, inputs, targets, loss_fn, progress=counts)

    def check_result(self, returned: Any) -> StepResult:
        """Check what the step returned or yielded, and return it as a `StepResult`.

        Raises:
            WrongResultError: `returned` is neither a loss nor a mapping with a loss and scalars.
        """
        if isinstance(returned, Generator):
            cause = "it returns a generator, and is not a generator function itself"
            raise WrongResultError(self.key, cause, "write yield in the step itself, or `yield from` another generator")
        if not isinstance(returned, Mapping):
            check_loss_value(returned, self.key)
            self.returns_denominator = False
            return StepResult(returned)
        if "loss" not in returned:
            cause = f"it returns a mapping with {', '.join(map(str, returned)) or 'no entries'}, without 'loss'"
            raise WrongResultError(self.key, cause, "add the loss that is minimized under the key 'loss'")
        rest = dict(returned)
        loss, denominator, outputs = rest.pop("loss"), rest.pop("denominator", None), rest.pop("outputs", None)
        check_loss_value(loss, self.key)
        self.returns_denominator = denominator is not None
        if denominator is not None:
            self._check_number("denominator", denominator)
        return StepResult(loss, denominator, outputs, {name: self._scalar(name, rest[name], loss) for name in rest})

    def _scalar(self, name: Any, entry: Any, loss: Tensor) -> tuple[Tensor, Tensor | int | None]:
        if name in RESERVED or not isinstance(name, str) or not name:
            raise WrongResultError(self.key, f"a further number is named {name!r}", "choose another name for it")
        value, denominator = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        self._check_number(name, value)
        if denominator is not None:
            self._check_number(f"the denominator of {name}", denominator)
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), device=loss.device)
        return value.detach().reshape(()), denominator

    def _check_number(self, name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        if not is_number or (isinstance(value, Tensor) and value.is_complex()):
            cause = f"{name} is {describe(value)}, expected a number or a tensor with one element"
            hint = f"return its mean over the samples, or a pair: '{name}': (mean, denominator)"
            raise WrongResultError(self.key, cause, hint)


def steps_with_state(*steps: CustomStep | None) -> dict[str, Any]:
    """Return the objects of custom steps that have a state, by config key. A shared object has its first key only."""
    found: dict[str, Any] = {}
    for step in steps:
        if step is not None and hasattr(step.function, "state_dict") and step.function not in found.values():
            found[step.key] = step.function
    return found

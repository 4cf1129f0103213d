"""A custom training or evaluation step: the call of the user's code, and what it returns.

`custom_training` runs the steps.
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
from trainkit.core.source import name_and_place
from trainkit.training.progress import Progress
from trainkit.training.wrong_part import WrongPartError, check_loss_value

ARGUMENTS = ("model", "inputs", "targets", "loss_fn")
RESERVED = frozenset({"loss_sum", "samples", "skipped", "scale"})  # trainkit's own names of training metrics


@dataclass(frozen=True)
class StepProgress:
    """The part of the progress that a step may depend on.

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
    """What a step returns for a batch or a micro batch.

    Attributes:
        loss: a scalar, the mean over `denominator`.
        denominator: None if the step does not return it.
        outputs: the outputs for the metrics; None if the step does not return them.
        scalars: name -> a value and its denominator (None: that of the loss).
    """

    loss: Tensor
    denominator: Tensor | int | None = None
    outputs: Any = None
    scalars: dict[str, tuple[Tensor, Tensor | int | None]] = field(default_factory=dict)


class CustomStep:
    """A user's step: a function of (model, inputs, targets, loss_fn), or an object that is called so.

    Args:
        key: `training_step` or `evaluation_step`.
        function: the function or the object. If it has a parameter `progress`, it gets a `StepProgress`.

    Attributes:
        is_generator: the step yields a loss for each optimizer.
        returns_denominator: whether the last call returned a denominator; None before the first call.
    """

    def __init__(self, key: str, function: Any) -> None:
        self.key, self.function = key, function
        called = function if inspect.isroutine(function) else getattr(function, "func", type(function).__call__)
        self.is_generator = inspect.isgeneratorfunction(called)
        try:
            self.takes_progress = "progress" in inspect.signature(function).parameters
        except (TypeError, ValueError):  # compiled code has no signature
            self.takes_progress = False
        self.returns_denominator: bool | None = None

    @property
    def place(self) -> str:
        """The name of the step, and where it is defined."""
        return name_and_place(getattr(self.function, "func", self.function), "__call__")

    @property
    def whole_batch(self) -> bool:
        """Whether the step declares that its batches may not be split."""
        declared = getattr(
            self.function, "whole_batch", getattr(getattr(self.function, "func", None), "whole_batch", 0)
        )
        return declared is True

    @property
    def may_split(self) -> bool:
        """Whether the losses of micro batches add up, as far as it is known."""
        return not self.whole_batch and not self.is_generator and self.returns_denominator is not False

    def split_error(self, micro_batch: int | None) -> ConfigError | None:
        """Return the error for a `micro_batch` that the step does not allow, or None."""
        if self.may_split:
            return None
        reason = "has whole_batch = True"
        if self.is_generator:
            reason = "updates the weights several times, so its batch may not be split"
        elif not self.whole_batch:
            reason = "returns no denominator, so it is unknown how the losses of micro batches add up"
        hint = "write micro_batch=off, and a batch_size that fits into memory"
        if not self.whole_batch and not self.is_generator:
            hint = (
                "return {'loss': loss, 'denominator': len(targets)} for a mean over samples; or write micro_batch=off"
            )
        return ConfigError(f"micro_batch={micro_batch}: {self.key}: {self.place} {reason}", hint=hint)

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, loss_fn: nn.Module, progress: Progress) -> Any:
        """Return what the user's step returns."""
        if not self.takes_progress:
            return self.function(model, inputs, targets, loss_fn)
        clock = StepProgress(progress.epoch, progress.step, progress.batch, progress.batches)
        return self.function(model, inputs, targets, loss_fn, progress=clock)

    def result(self, returned: Any) -> StepResult:
        """Return what the step has returned or yielded, checked.

        Raises:
            WrongPartError: it is not a loss, or a mapping with a loss and scalars.
        """
        if isinstance(returned, Generator):
            cause = "it returns a generator, and is not a generator function itself"
            raise WrongPartError(self.key, cause, "write yield in the step itself, or `yield from` another generator")
        if not isinstance(returned, Mapping):
            check_loss_value(returned, self.key)
            self.returns_denominator = False
            return StepResult(returned)
        if "loss" not in returned:
            cause = f"it returns a mapping with {', '.join(map(str, returned)) or 'no entries'}, without 'loss'"
            raise WrongPartError(self.key, cause, "add the loss that is minimized under the key 'loss'")
        rest = dict(returned)
        loss, denominator, outputs = rest.pop("loss"), rest.pop("denominator", None), rest.pop("outputs", None)
        check_loss_value(loss, self.key)
        self.returns_denominator = denominator is not None
        if denominator is not None:
            self._check_number("denominator", denominator)
        return StepResult(loss, denominator, outputs, {name: self._scalar(name, rest[name], loss) for name in rest})

    def _scalar(self, name: Any, entry: Any, loss: Tensor) -> tuple[Tensor, Tensor | int | None]:
        if name in RESERVED or not isinstance(name, str) or not name:
            raise WrongPartError(self.key, f"a further number is named {name!r}", "choose another name for it")
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
            hint = f"return its mean, and if it is no mean over samples a pair: '{name}': (mean, denominator)"
            raise WrongPartError(self.key, cause, hint)


def steps_with_state(*steps: CustomStep | None) -> dict[str, Any]:
    """Return the objects of custom steps that have a state, by their keys. A shared object is named once."""
    found: dict[str, Any] = {}
    for step in steps:
        if step is not None and hasattr(step.function, "state_dict") and step.function not in found.values():
            found[step.key] = step.function
    return found

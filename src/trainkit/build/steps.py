"""Build the custom training and evaluation steps, and check that the other settings support them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from trainkit.build.functions import build_function
from trainkit.config.schema import SUPERVISED, Node
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, UserCodeError
from trainkit.training.custom_step import ARGUMENTS, CustomStep


def build_steps(settings: Settings, device: torch.device) -> tuple[CustomStep | None, CustomStep | None]:
    """Build the training step and the evaluation step; None: the supervised step.

    If both settings are equal, both steps use one object.

    Raises:
        ConfigError: a step cannot be called, or does not support another setting.
        UserCodeError: the constructor of a step raised an error.
    """
    training = build_step(settings.training_step, "training_step", device)
    if training is not None and settings.evaluation_step == settings.training_step:
        evaluation: CustomStep | None = CustomStep("evaluation_step", training.function)
    else:
        evaluation = build_step(settings.evaluation_step, "evaluation_step", device)
    refuse_generator(evaluation)
    if training is not None:
        check_settings(training, settings)
    return training, evaluation


def refuse_generator(evaluation: CustomStep | None) -> None:
    """Raise `ConfigError` if an evaluation step yields losses as a training step may do."""
    if evaluation is not None and evaluation.is_generator:
        cause = f"evaluation_step: {evaluation.place} is a generator, and a validation updates nothing"
        raise ConfigError(cause, hint="return a mapping with loss and outputs, or write evaluation_step=off")


def build_step(node: str | Node | None, key: str, device: torch.device) -> CustomStep | None:
    """Build a custom step on its device; None: the supervised step.

    Raises:
        ConfigError: the step cannot be called with `ARGUMENTS`.
        UserCodeError: the constructor of the step or its method `to` raised an error.
    """
    if node is None or node == SUPERVISED:
        return None
    function: Any = build_function(node, key)
    step = CustomStep(key, function)
    if hasattr(function, "state_dict") and not hasattr(function, "load_state_dict"):
        cause = f"{key}: {step.place} has state_dict, but no load_state_dict"
        raise ConfigError(cause, hint="write def load_state_dict(self, saved), which a resume calls")
    try:
        progress = {"progress": None} if step.takes_progress else {}
        inspect.signature(function).bind(*ARGUMENTS, **progress)
    except TypeError as error:
        cause = f"{key}: {step.place} is called with ({', '.join(ARGUMENTS)}): {error}"
        raise ConfigError(cause, hint=f"write def {key}({', '.join(ARGUMENTS)})") from error
    except ValueError:  # compiled code has no signature
        pass
    if hasattr(function, "to"):
        try:
            function.to(device)
        except Exception as error:
            raise UserCodeError(key, error) from error
    return step


def check_settings(step: CustomStep, settings: Settings) -> None:
    """Raise `ConfigError` if a training step does not support a setting."""
    size = settings.micro_batch
    error = step.split_error(size) if size is not None and size < settings.batch_size else None
    if error is not None:
        raise error
    if step.is_generator and settings.on_nonfinite == "skip":
        cause = f"on_nonfinite=skip: {step.place} updates the weights several times, and cannot be undone"
        raise ConfigError(cause, hint="write on_nonfinite=rollback or on_nonfinite=stop")

"""Checks of the first batch for mistakes that give wrong numbers, or an error that does not name its cause.

They run in the first step of a new training. Later steps are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.pytree import batch_size_of, describe, tensors_in
from trainkit.core.rng import preserve_rng
from trainkit.core.shards import local_part
from trainkit.core.source import name_and_place
from trainkit.losses import FLOAT_TARGET_LOSSES, REGRESSION_LOSSES
from trainkit.training.finite import gradient_values
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import is_sum
from trainkit.training.split_comparison import compare_loss
from trainkit.training.state import State
from trainkit.training.wrong_result import WrongResultError, check_loss_value

LARGE_TARGETS = 1000.0  # the mean size of targets that are noted
CLASS_HINT = "return class numbers as int64, or choose a loss for numbers: loss=mse"


class FirstBatch:
    """A hook that checks the first step of a new training: outputs, targets, loss and gradient.

    Args:
        hooks: the hooks of the training, whose `on_note` is called.
    """

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.hooks = hooks
        self.handles: list[Any] = []
        self.done = False

    def on_start(self, state: State) -> None:
        """Register the checks of a new training."""
        self.done = state.progress.step > 0
        loss_fn = state.objects.loss_fn
        if state.objects.training_step is not None or isinstance(loss_fn, torch.jit.ScriptModule):
            return  # a custom step may call the loss with anything, and a scripted loss takes no hooks
        if not self.done:
            self.handles.append(loss_fn.register_forward_pre_hook(check_arguments))
            self.handles.append(loss_fn.register_forward_hook(lambda *call: self.check_loss(state, *call)))

    def check_loss(self, state: State, loss_fn: nn.Module, arguments: tuple[Any, ...], loss: Any) -> None:
        """Check the first loss that has a gradient."""
        if not torch.is_grad_enabled():  # a comparison of micro batches, before the first step
            return
        self.remove()
        outputs, targets = arguments
        check_loss_value(loss)
        notes = (
            more_outputs_than_classes(loss_fn, outputs, state.settings.classes),
            unnormalized_probabilities(loss_fn, targets),
            unscaled_images(loss_fn, targets),
            large_targets(loss_fn, targets),
            probabilities_or_logits(loss_fn, outputs),
            wrong_denominator(loss_fn, outputs, targets),
        )
        for text in filter(None, notes):
            call_hooks(self.hooks, "on_note", state, f"note: {text}")

    def on_step(self, state: State) -> None:
        """Check the gradient of the first step."""
        if self.done:
            return
        self.done = True
        self.remove()
        check_parameters_of_step(state)
        if state.objects.training_step is not None and float(state.progress.loss.denominator) == 0:
            text = "note: the denominator of the first batch is 0, so train/loss leaves out its loss"
            call_hooks(self.hooks, "on_note", state, f"{text}; check the denominator of the training step")
        gradients = [param.grad for param in state.objects.parameters if param.grad is not None]
        if not gradients or state.objects.needs_closure:
            return
        is_zero = not any(bool(gradient_values(local_part(gradient)).any()) for gradient in gradients)
        if state.objects.true_everywhere(is_zero):
            text = "note: the gradient of the first batch is exactly 0 in every parameter, so the loss changes nothing"
            call_hooks(self.hooks, "on_note", state, f"{text}; check the loss and the targets")

    def remove(self) -> None:
        """Remove the checks from the loss."""
        while self.handles:
            self.handles.pop().remove()


# -------------------------------------------------------------------------------------- a custom step


def check_parameters_of_step(state: State) -> None:
    """Raise `WrongResultError` if a custom step got gradients for parameters of its own, which no optimizer updates."""
    step = state.objects.training_step
    if step is None:
        return
    updated = {id(param) for param in state.objects.parameters}
    parts: dict[str, Any] = {"": step.function} | getattr(step.function, "__dict__", {})
    for name, module in parts.items():
        params = module.named_parameters(name) if isinstance(module, nn.Module) else ()
        wrong = [own for own, param in params if param.grad is not None and id(param) not in updated]
        if wrong:
            cause = f"the loss depends on its parameter {wrong[0]}, which no optimizer updates"
            hint = "move the parameters into the model or the loss; or freeze them, and compute with torch.no_grad()"
            raise WrongResultError(step.key, cause, hint)


# ------------------------------------------------------------------------------- outputs and targets


def check_arguments(loss_fn: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raise `WrongResultError` if the outputs or the targets do not fit a loss of torch."""
    if not type(loss_fn).forward.__module__.startswith("torch.nn.") or not torch.is_grad_enabled():
        return
    outputs, targets = arguments
    name = type(loss_fn).__name__
    if not isinstance(outputs, Tensor):
        hint = f"return a tensor from forward, or write a loss that takes {type(outputs).__name__}"
        if isinstance(outputs, Mapping):
            hint = "end the model with trainkit.models.Pick, which takes one entry, or write loss=from_model"
        raise WrongResultError("model", f"it returns {describe(outputs)}, and {name} needs a tensor", hint)
    if not isinstance(targets, Tensor):
        hint = "return a number or a tensor as the target, or write a loss that takes these targets"
        raise WrongResultError("data.train", f"the targets are {describe(targets)}, and {name} needs a tensor", hint)
    if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
        check_classes(loss_fn, outputs, targets)
    elif isinstance(loss_fn, FLOAT_TARGET_LOSSES) and targets.shape != outputs.shape:
        hint = f"return targets of shape {tuple(outputs.shape[1:])} from the data set, or reshape the outputs"
        hint = hint if targets.is_floating_point() else "choose loss=cross_entropy for class numbers"
        cause = f"the targets are {describe(targets)}, and {name} of outputs {describe(outputs)} needs the same shape"
        raise WrongResultError("data.train", cause, hint)
    elif isinstance(loss_fn, nn.BCEWithLogitsLoss) and bool((targets < 0).any() | (targets > 1).any()):
        cause = f"a target is {float(targets.max()):.4g}, and {name} needs targets from 0 to 1"
        raise WrongResultError("data.train", cause, "choose loss=cross_entropy for class numbers")


def check_classes(loss_fn: nn.CrossEntropyLoss | nn.NLLLoss, outputs: Tensor, targets: Tensor) -> None:
    """Raise `WrongResultError` if the targets of a cross entropy are not classes or probabilities of the outputs."""
    name, found = type(loss_fn).__name__, f"the targets are {describe(targets)}"
    shape, expected = tuple(outputs.shape), (len(outputs), *outputs.shape[2:]) if outputs.dim() > 1 else ()
    if outputs.dim() < 2:
        cause = f"it returns {describe(outputs)} for a batch, and {name} needs an output per class: (N, classes)"
        raise WrongResultError("model", cause, "return (N, classes), or choose a loss for numbers: loss=mse")
    if outputs.shape[1] == 1:
        cause = f"{name} over one output is always 0: the outputs are {describe(outputs)}, {found}"
        hint = "choose loss=mse for numbers or loss=bce for two classes, or give the model an output per class"
        raise WrongResultError("loss", cause, hint)
    if targets.is_floating_point():
        if isinstance(loss_fn, nn.NLLLoss) or targets.shape != outputs.shape:
            cause = f"{found}, and {name} of outputs {shape} needs classes {expected} int64"
            cause += "" if isinstance(loss_fn, nn.NLLLoss) else f", or probabilities {shape}"
            raise WrongResultError("data.train", cause, CLASS_HINT)
        if bool((targets < 0).any()):
            cause = f"{found} with values down to {float(targets.min()):.4g}, and {name} needs probabilities"
            raise WrongResultError("data.train", cause, CLASS_HINT)
        return
    if tuple(targets.shape) != expected:
        hint = f"return targets of shape {expected[1:] or '()'} from the data set"
        is_flat = len(outputs) == targets.numel() != len(targets)
        if (outputs.dim() > 2 and outputs.shape[:-1] == targets.shape) or is_flat:
            hint = "return outputs (N, classes, ...) from the model, such as outputs.transpose(1, 2)"
        raise WrongResultError("data.train", f"{found}, and {name} of outputs {shape} needs {expected}", hint)
    if targets.dtype not in (torch.int64, torch.uint8):
        hint = "return int(target), or a tensor of dtype torch.int64"
        raise WrongResultError("data.train", f"{found}, and {name} needs int64", hint)
    counted = targets[targets != loss_fn.ignore_index]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < outputs.shape[1]:
        wrong = int(counted.max()) if counted.max() >= outputs.shape[1] else int(counted.min())
        cause = f"a target is class {wrong}, and the model has {outputs.shape[1]} outputs: classes 0 to"
        hint = "number the classes from 0, and give the model an output for each: see data.classes"
        hint = f"if it marks targets to ignore, write loss.ignore_index={wrong}; else {hint}" if wrong < 0 else hint
        raise WrongResultError("data.train", f"{cause} {outputs.shape[1] - 1}", hint)


# --------------------------------------------------------------------------------------------- notes


def more_outputs_than_classes(loss_fn: nn.Module, outputs: Any, classes: int | None) -> str:
    """Return a note if the model has outputs for classes that the data does not have, else ''."""
    if not isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) or not isinstance(outputs, Tensor) or classes is None:
        return ""
    if outputs.dim() < 2 or outputs.shape[1] <= classes:
        return ""
    return f"the model has {outputs.shape[1]:,} outputs, and the data has {classes:,} classes (data.classes)"


def unnormalized_probabilities(loss_fn: nn.Module, targets: Any) -> str:
    """Return a note if the float targets of a cross entropy do not add up to 1, else ''."""
    if not isinstance(loss_fn, nn.CrossEntropyLoss) or not isinstance(targets, Tensor):
        return ""
    if not targets.is_floating_point() or targets.dim() < 2:
        return ""
    sums = targets.sum(dim=1)
    if bool((sums - 1).abs().max() <= 0.01):
        return ""
    low, high = float(sums.min()), float(sums.max())
    return f"the targets are not probabilities: those of a sample add up to {low:.4g} to {high:.4g}, not to 1"


def unscaled_images(loss_fn: nn.Module, targets: Any) -> str:
    """Return a note if a loss for numbers gets uint8 images as targets, else ''."""
    if not isinstance(loss_fn, FLOAT_TARGET_LOSSES) or not isinstance(targets, Tensor):
        return ""
    if targets.dtype != torch.uint8 or targets.dim() < 3:
        return ""
    return (
        f"the targets are uint8 {tuple(targets.shape)} with values up to {int(targets.max())}, and are not scaled; "
        "uint8 inputs become floats from 0 to 1"
    )


def large_targets(loss_fn: nn.Module, targets: Any) -> str:
    """Return a note if the targets of a regression are much larger than the outputs of a new model, else ''."""
    if not isinstance(loss_fn, REGRESSION_LOSSES) or not isinstance(targets, Tensor):
        return ""
    size = float(targets.detach().float().abs().mean()) if targets.is_floating_point() else 0.0
    if not LARGE_TARGETS < size < math.inf:
        return ""
    return (
        f"the targets have a size of {size:,.0f} on average, and a new model outputs numbers near 0; "
        "training is easier if the data set divides its targets by a constant"
    )


def probabilities_or_logits(loss_fn: nn.Module, outputs: Any) -> str:
    """Return a note if a loss of classes gets probabilities for logits or log-probabilities, else ''."""
    if (
        not isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        or not isinstance(outputs, Tensor)
        or outputs.dim() < 2
    ):
        return ""
    values = outputs.detach().float()
    if not bool(values.isfinite().all()):
        return ""
    if isinstance(loss_fn, nn.NLLLoss):
        if bool((values.exp().sum(dim=1) - 1).abs().max() <= 0.01):
            return ""
        return "the outputs are not log-probabilities, which NLLLoss needs: end the model in log_softmax"
    if bool(values.min() < 0) or bool((values.sum(dim=1) - 1).abs().max() > 0.001):
        return ""
    return "the outputs are probabilities, and CrossEntropyLoss applies softmax itself: let the model return logits"


def wrong_denominator(loss_fn: nn.Module, outputs: Any, targets: Any) -> str:
    """Return a note if a custom loss is not the mean that its denominators say, else ''.

    The loss of the batch is compared with the losses of its parts.
    """
    if (
        type(loss_fn).forward.__module__.startswith("torch.nn.")
        or is_sum(loss_fn)
        or getattr(loss_fn, "whole_batch", None) is not None
    ):
        return ""
    with suppress(Exception), torch.no_grad(), preserve_rng():
        samples = batch_size_of(targets)
        in_second = any(t.dim() > 1 and t.shape[1] == samples for t in tensors_in(outputs))
        if samples < 2 or in_second:  # it is unknown which dimension is that of the samples
            return ""
        finding = compare_loss(loss_fn, outputs, targets, samples, [max(1, samples // 8)])
        if finding.is_sum:
            return f"{name_and_place(loss_fn)} returns a sum over the batch: give it reduction = 'sum'"
        if finding.difference:
            fix = "define denominator(targets), or declare whole_batch = True if the loss compares samples"
            shapes = {tuple(part.shape) for part in (outputs, targets) if isinstance(part, Tensor)}
            if len(shapes) == 2 and targets.is_floating_point():
                fix = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} may broadcast to each other"
            return f"{finding.difference}; {fix}"
    return ""

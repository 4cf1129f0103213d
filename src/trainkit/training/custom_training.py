"""Training and evaluation by custom steps: one update, or one update for each optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of
from trainkit.core.spelling import did_you_mean
from trainkit.training.custom_step import CustomStep, StepResult
from trainkit.training.metric_set import detach
from trainkit.training.state import State
from trainkit.training.step import accumulate_gradient, before_update, micro_batches, parameters_of, update, update_with
from trainkit.training.wrong_part import WrongPartError


@dataclass(frozen=True)
class Part:
    """What a step returned for a micro batch.

    Attributes:
        inputs: the inputs of the micro batch.
        targets: its targets.
        result: what the step returned, without the graph.
        weight: the denominator of the loss, or the number of samples.
    """

    inputs: Any
    targets: Any
    result: StepResult
    weight: Tensor | float

    @property
    def scalars(self) -> list[tuple[str, Tensor, Tensor | float]]:
        """The further scalars: name, value and denominator."""
        scalars = self.result.scalars.items()
        return [(name, value, self.weight if own is None else own) for name, (value, own) in scalars]


def custom_train_step(state: State, step: CustomStep, inputs: Any, targets: Any) -> None:
    """Update the weights by a custom step, and add its losses and scalars to the means of the epoch."""
    if step.is_generator:
        return update_in_turn(state, step, inputs, targets)
    objects = state.objects
    kept: list[Part] = []

    def evaluate(*, first: bool) -> tuple[Tensor, Tensor | float]:
        parts = list(parts_with_gradients(state, step, inputs, targets))
        if first:
            kept.extend(parts)
        return total_loss(parts)

    update_with(state, evaluate)
    for part in kept:
        add_scalars(state, part)
        state.progress.loss.update(part.result.loss, weight=part.weight)
        if objects.train_metrics:
            objects.train_metrics.update(required_outputs(step, part.result), part.targets)
    return None


def parts_with_gradients(state: State, step: CustomStep, inputs: Any, targets: Any) -> Iterator[Part]:
    """Yield the results of the micro batches, while the gradient of the whole batch accumulates.

    The denominator of the whole batch is unknown before the last micro batch. So the first one predicts it, and the
    gradient is corrected at the end.
    """
    objects, samples = state.objects, batch_size_of(inputs)
    predicted = total = 0.0
    for part in step_parts(state, step, objects.model, objects.loss_fn, inputs, targets):
        count = batch_size_of(part.inputs)
        loss: Tensor | None = part.result.loss
        if count < samples:
            weight = float(part.weight)
            predicted = predicted or weight * samples / count
            total += weight
            loss = part.result.loss * (weight / predicted) if predicted else None
        if loss is not None and torch.is_grad_enabled():
            (loss if objects.scaler is None else objects.scaler.scale(loss)).backward()
        yield replace(part, result=without_graph(part.result))
        del loss, part  # before the next forward pass needs memory
    if total and total != predicted:
        for param in objects.parameters:
            if param.grad is not None:
                param.grad.mul_(predicted / total)


def gradient_of_batch(state: State, inputs: Any, targets: Any) -> Tensor:
    """Accumulate the gradient of a batch without an update; return the loss.

    Raises:
        ConfigError: the training step updates the weights several times.
    """
    step = state.objects.training_step
    if step is None:
        return accumulate_gradient(state, inputs, targets)[0]
    if step.is_generator:
        cause = f"training_step: {step.place} yields a loss for each optimizer, so a batch has no single gradient"
        raise ConfigError(cause, hint="train with watch=[NAME], which records the gradient of a parameter")
    return total_loss(list(parts_with_gradients(state, step, inputs, targets)))[0]


def step_parts(
    state: State, step: CustomStep, model: nn.Module, loss_fn: nn.Module, inputs: Any, targets: Any
) -> Iterator[Part]:
    """Yield what a step returns for each micro batch.

    Raises:
        ConfigError: the batch is split, and the step does not allow it.
        WrongPartError: the step returns something else than a loss or a mapping with a loss.
    """
    samples, micro_batch = batch_size_of(inputs), state.progress.micro_batch
    for part, part_targets in micro_batches(inputs, targets, micro_batch):
        with state.objects.autocast:
            result = step.result(step(model, part, part_targets, loss_fn, state.progress))
        count = batch_size_of(part)
        error = step.split_error(micro_batch) if count < samples else None
        if error is not None:
            raise error
        yield Part(part, part_targets, result, count if result.denominator is None else result.denominator)
        del result


def total_loss(parts: list[Part]) -> tuple[Tensor, Tensor | float]:
    """Return the loss of a batch and its denominator."""
    if len(parts) == 1:
        return parts[0].result.loss, parts[0].weight
    weights = [float(part.weight) for part in parts]
    losses = [part.result.loss * weight for part, weight in zip(parts, weights, strict=True) if weight]
    if not losses:  # a mean over nothing
        return torch.zeros_like(parts[0].result.loss), 0
    return torch.stack(losses).sum() / sum(weights), sum(weights)


def update_in_turn(state: State, step: CustomStep, inputs: Any, targets: Any) -> None:
    """Update the parameters of one optimizer for each loss that the step yields."""
    objects, progress = state.objects, state.progress
    total, norms = torch.zeros((), device=objects.device), []
    parts: list[tuple[str, Part]] = []
    for name, result in yielded_losses(state, step, inputs, targets):
        optimizer = objects.optimizers[name]
        params = [param for param in parameters_of(optimizer) if param.requires_grad]  # the others are frozen
        optimizer.zero_grad()
        loss = result.loss if objects.scaler is None else objects.scaler.scale(result.loss)
        if params:
            loss.backward(inputs=params)  # only these, because the loss of one part often reaches the others
        if params and all(param.grad is None for param in params):
            cause = f"the loss of {name!r} does not depend on a parameter of this optimizer"
            raise WrongPartError(step.key, cause, "yield the name of the optimizer that the loss trains")
        weight = batch_size_of(inputs) if result.denominator is None else result.denominator
        result = without_graph(result)
        before_update(state, result.loss, weight, optimizer=optimizer)
        norms += [progress.grad_norm] if progress.in_last_batch and progress.grad_norm is not None else []
        update(state, optimizer, last=False)
        total = total + result.loss
        parts.append((name, Part(inputs, targets, result, weight)))
    if not parts:
        raise WrongPartError(step.key, "it yields no loss for a batch", "yield (optimizer name, loss) at least once")
    if objects.scaler is not None:
        objects.scaler.update()
    if norms:
        progress.grad_norm = torch.stack(norms).norm()  # over the parameters of all optimizers
    progress.loss.update(total, weight=batch_size_of(inputs))
    for name, part in parts:
        progress.add_mean(name, part.result.loss, part.weight)
        add_scalars(state, part)
    outputs = [part.result.outputs for _, part in parts if part.result.outputs is not None]
    if objects.train_metrics:
        objects.train_metrics.update(outputs[-1] if outputs else required_outputs(step, parts[-1][1].result), targets)


def yielded_losses(state: State, step: CustomStep, inputs: Any, targets: Any) -> Iterator[tuple[str, StepResult]]:
    """Yield the optimizer names and the results that a step yields for a batch.

    Raises:
        WrongPartError: the step yields something else, or an unknown name.
    """
    objects = state.objects
    steps = step(objects.model, inputs, targets, objects.loss_fn, state.progress)
    while True:
        with objects.autocast:
            item = next(steps, None)
        if item is None:
            return
        if not isinstance(item, tuple) or len(item) != 2:
            cause = f"it yields a {type(item).__name__}, expected a pair (optimizer name, loss)"
            raise WrongPartError(step.key, cause, f"the names are {', '.join(objects.optimizers)}")
        name, returned = item
        if name not in objects.optimizers:
            hint = did_you_mean(str(name), list(objects.optimizers))
            raise WrongPartError(step.key, f"it yields {name!r}, and there is no optimizer of this name", hint)
        yield name, step.result(returned)


def evaluation_parts(state: State, step: CustomStep, inputs: Any, targets: Any, *, outputs: bool) -> list[Part]:
    """Return what an evaluation step returns for each micro batch of a batch.

    Args:
        state: the state of the training.
        step: the evaluation step.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        outputs: whether the outputs are needed.
    """
    model, loss_fn = state.objects.evaluated
    parts = [
        replace(part, result=without_graph(part.result))
        for part in step_parts(state, step, model, loss_fn, inputs, targets)
    ]
    if outputs:
        for part in parts:
            required_outputs(step, part.result)
    return parts


def add_scalars(state: State, part: Part) -> None:
    """Add the further scalars of a step to the means of the epoch."""
    for name, value, weight in part.scalars:
        state.progress.add_mean(name, value, weight)


def required_outputs(step: CustomStep, result: StepResult) -> Any:
    """Return the outputs.

    Raises:
        WrongPartError: the step does not return them.
    """
    if result.outputs is None:
        cause = "it returns no 'outputs', which the metrics (metrics) or a hook (on_val_batch) need"
        raise WrongPartError(step.key, cause, "return {'loss': loss, 'outputs': outputs}")
    return result.outputs


def without_graph(result: StepResult) -> StepResult:
    """Return a result that keeps no memory of the forward pass."""
    return replace(result, loss=result.loss.detach().reshape(()), outputs=detach(result.outputs))

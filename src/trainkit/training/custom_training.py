"""Training and evaluation by custom steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of, map_tensors
from trainkit.training.custom_step import CustomStep, StepResult
from trainkit.training.metric_set import detach
from trainkit.training.sharding import filling_batches
from trainkit.training.state import State
from trainkit.training.step import accumulate_gradient, joined, micro_batches, number_of_passes, update_with
from trainkit.training.wrong_result import WrongResultError


@dataclass(frozen=True)
class MicroBatchResult:
    """The result of a step for a micro batch.

    Attributes:
        inputs: the inputs of the micro batch.
        targets: the targets of the micro batch.
        result: the checked result of the step.
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
        return [
            (name, value, self.weight if denominator is None else denominator) for name, (value, denominator) in scalars
        ]

    def without_graph(self) -> MicroBatchResult:
        """Return the result without the autograd graph, which holds the memory of the forward pass."""
        loss, outputs = self.result.loss.detach().reshape(()), detach(self.result.outputs)
        return replace(self, result=replace(self.result, loss=loss, outputs=outputs))


def custom_train_step(state: State, step: CustomStep, inputs: Any, targets: Any) -> None:
    """Update the weights by a custom step, and add its losses and scalars to the means of the epoch."""
    kept: list[MicroBatchResult] = []

    def evaluate(*, first: bool) -> tuple[Tensor, Tensor | float]:
        results = results_of_all_ranks(state, list(results_with_gradient(state, step, inputs, targets)))
        if first:
            kept.extend(results)
        return total_loss(results)

    update_with(state, evaluate)
    for part in kept:
        add_scalars(state, part)
        state.progress.loss.update(part.result.loss, weight=part.weight)
    update_train_metrics(state, step, kept)


def update_train_metrics(state: State, step: CustomStep, results: list[MicroBatchResult]) -> None:
    """Add the outputs of a batch to the metrics of the training data."""
    objects = state.objects
    if objects.train_metrics:
        parts = [(required_outputs(step, part.result), part.targets) for part in results]
        for outputs, targets in joined(parts) if objects.ranks.are_several else parts:
            objects.train_metrics.update(outputs, targets)


def results_with_gradient(state: State, step: CustomStep, inputs: Any, targets: Any) -> Iterator[MicroBatchResult]:
    """Yield the result of each micro batch, while the gradient of the whole batch accumulates.

    The denominator of the whole batch is known only after the last micro batch. So the first micro batch predicts the
    denominator, and the gradient is corrected at the end. With several ranks, the prediction is the number of samples
    of the batch, which every rank knows.
    """
    objects, samples = state.objects, batch_size_of(inputs)
    ranks = objects.ranks
    predicted, total = float(state.progress.samples_of_batch if ranks.are_several else 0), 0.0
    with ranks.summed_gradients(objects.parameters, connected=objects.sharded):
        for part in micro_batch_results(state, step, objects.model, objects.loss_fn, inputs, targets):
            count = batch_size_of(part.inputs)
            loss: Tensor | None = part.result.loss
            if count < samples or ranks.are_several:
                weight = float(part.weight)
                predicted = predicted or weight * samples / count
                total += weight
                loss = part.result.loss * (weight / predicted) if predicted else None
            if loss is not None and torch.is_grad_enabled():
                (loss if objects.scaler is None else objects.scaler.scale(loss)).backward()
            yield part.without_graph()
            del loss, part  # before the next forward pass needs memory
        for result in filling_results(state, step, objects.model, objects.loss_fn, inputs, targets):
            if torch.is_grad_enabled():
                (result.loss * 0).backward()
    total = float(ranks.sum_number(total, objects.device))
    if total and total != predicted:
        for param in objects.parameters:
            if param.grad is not None:
                param.grad.mul_(predicted / total)


def results_of_all_ranks(state: State, results: list[MicroBatchResult]) -> list[MicroBatchResult]:
    """Return the results of the micro batches of every rank; those of several ranks are without inputs."""
    objects = state.objects
    if not objects.ranks.are_several:
        return results
    sent = []
    for part in results:
        has_metrics = bool(objects.train_metrics)
        result = part.result if has_metrics else replace(part.result, outputs=None)
        values = vars(replace(part, inputs=None, targets=part.targets if has_metrics else None, result=result))
        sent.append(map_tensors({**values, "result": vars(result)}, lambda tensor: tensor.cpu()))
    gathered = [part for share in objects.ranks.gather(sent) for part in share]
    moved = [map_tensors(part, lambda tensor: tensor.to(objects.device)) for part in gathered]
    return [MicroBatchResult(**{**part, "result": StepResult(**part["result"])}) for part in moved]


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
    return total_loss(list(results_with_gradient(state, step, inputs, targets)))[0]


def micro_batch_results(
    state: State, step: CustomStep, model: nn.Module, loss_fn: nn.Module, inputs: Any, targets: Any
) -> Iterator[MicroBatchResult]:
    """Yield the result of a step for each micro batch of a batch.

    Raises:
        ConfigError: the batch is split, and the step does not support it.
        WrongResultError: the step returns neither a loss nor a mapping with a loss.
    """
    samples, micro_batch = batch_size_of(inputs), state.progress.micro_batch
    for part, part_targets in micro_batches(inputs, targets, micro_batch, number_of_passes(state)):
        with state.objects.autocast:
            result = step.check_result(step(model, part, part_targets, loss_fn, state.progress))
        count = batch_size_of(part)
        error = step.split_error(micro_batch) if count < samples else None
        if error is not None:
            raise error
        yield MicroBatchResult(part, part_targets, result, count if result.denominator is None else result.denominator)
        del result


def filling_results(
    state: State, step: CustomStep, model: nn.Module, loss_fn: nn.Module, inputs: Any, targets: Any
) -> Iterator[StepResult]:
    """Yield the results of a step that do not count; see `filling_batches`."""
    for part, part_targets in filling_batches(state, inputs, targets):
        with state.objects.autocast:
            yield step.check_result(step(model, part, part_targets, loss_fn, state.progress))


def total_loss(results: list[MicroBatchResult]) -> tuple[Tensor, Tensor | float]:
    """Return the loss of a batch and its denominator, from the results of its micro batches."""
    if len(results) == 1:
        return results[0].result.loss, results[0].weight
    weights = [float(part.weight) for part in results]
    losses = [part.result.loss * weight for part, weight in zip(results, weights, strict=True) if weight]
    if not losses:  # a mean over nothing
        return torch.zeros_like(results[0].result.loss), 0
    return torch.stack(losses).sum() / sum(weights), sum(weights)


# ------------------------------------------------------------------------------------- validation and metrics


def evaluation_results(
    state: State, step: CustomStep, inputs: Any, targets: Any, *, needs_outputs: bool
) -> list[MicroBatchResult]:
    """Return the result of an evaluation step for each micro batch of a batch.

    Args:
        state: the state of the training.
        step: the evaluation step.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        needs_outputs: whether a metric or a hook needs the outputs.

    Raises:
        WrongResultError: the outputs are needed, and the step does not return them.
    """
    model, loss_fn = state.objects.evaluated
    results = [part.without_graph() for part in micro_batch_results(state, step, model, loss_fn, inputs, targets)]
    deque(filling_results(state, step, model, loss_fn, inputs, targets), maxlen=0)
    if needs_outputs:
        for part in results:
            required_outputs(step, part.result)
    return results


def add_scalars(state: State, part: MicroBatchResult) -> None:
    """Add the further scalars of a step to the means of the epoch."""
    for name, value, weight in part.scalars:
        state.progress.add_mean(name, value, weight)


def required_outputs(step: CustomStep, result: StepResult) -> Any:
    """Return the outputs in a result.

    Raises:
        WrongResultError: the step does not return outputs.
    """
    if result.outputs is None:
        cause = "it returns no 'outputs', which the metrics (metrics) or a hook (on_val_batch) need"
        raise WrongResultError(step.key, cause, "return {'loss': loss, 'outputs': outputs}")
    return result.outputs

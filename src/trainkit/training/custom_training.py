"""Training and evaluation by custom steps: one update, or one update for each optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of, map_tensors
from trainkit.core.spelling import did_you_mean
from trainkit.training.custom_step import CustomStep, StepResult
from trainkit.training.metric_set import detach
from trainkit.training.objects import parameters_of
from trainkit.training.sharding import filling_batches
from trainkit.training.state import State
from trainkit.training.step import accumulate_gradient, before_update, micro_batches, update, update_with
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
    if step.is_generator:
        return update_each_optimizer(state, step, inputs, targets)
    objects = state.objects
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
        if objects.train_metrics:
            objects.train_metrics.update(required_outputs(step, part.result), part.targets)
    return None


def results_with_gradient(state: State, step: CustomStep, inputs: Any, targets: Any) -> Iterator[MicroBatchResult]:
    """Yield the result of each micro batch, while the gradient of the whole batch accumulates.

    The denominator of the whole batch is known only after the last micro batch. So the first micro batch predicts the
    denominator, and the gradient is corrected at the end. Several ranks predict the number of samples.
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
    shown = []
    for part in results:
        has_metrics = bool(objects.train_metrics)
        result = part.result if has_metrics else replace(part.result, outputs=None)
        values = vars(replace(part, inputs=None, targets=part.targets if has_metrics else None, result=result))
        shown.append(map_tensors({**values, "result": vars(result)}, lambda tensor: tensor.cpu()))
    gathered = [part for share in objects.ranks.gather(shown) for part in share]
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
    for part, part_targets in micro_batches(inputs, targets, micro_batch):
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


# ------------------------------------------------------------------------------------- several optimizers


def update_each_optimizer(state: State, step: CustomStep, inputs: Any, targets: Any) -> None:
    """Update the parameters of one optimizer for each loss that the step yields."""
    objects, progress, ranks = state.objects, state.progress, state.objects.ranks
    norms: list[Tensor] = []
    updates: list[tuple[str, list[MicroBatchResult]]] = []  # for each loss its optimizer, and the results of the ranks
    for name, result in yielded_losses(state, step, inputs, targets):
        optimizer = objects.optimizers[name]
        optimizer.zero_grad()
        weight = batch_size_of(inputs) if result.denominator is None else result.denominator
        loss = result.loss
        if ranks.are_several:
            loss = loss * (float(weight) / (float(ranks.sum_number(weight, objects.device)) or 1.0))
        with ranks.summed_gradients(parameters_of(optimizer)):
            backward_for(state, step, name, loss)
        whole = MicroBatchResult(inputs, targets, result, weight).without_graph()  # the batch is not split
        del result, loss  # the optimizer may need the memory of the graph
        parts = results_of_all_ranks(state, [whole])
        before_update(state, *total_loss(parts), optimizer=optimizer)
        norms += [progress.grad_norm] if progress.in_last_batch and progress.grad_norm is not None else []
        update(state, optimizer, last=False)
        updates.append((name, parts))
    if not updates:
        raise WrongResultError(step.key, "it yields no loss for a batch", "yield (optimizer name, loss) at least once")
    if objects.scaler is not None:
        objects.scaler.update()
    if norms:
        progress.grad_norm = torch.stack(norms).norm()  # over the parameters of all optimizers
    total = torch.zeros((), device=objects.device)
    for name, parts in updates:
        loss, denominator = total_loss(parts)
        total = total + loss
        progress.add_mean(name, loss, denominator)
        for part in parts:
            add_scalars(state, part)
    progress.loss.update(total, weight=progress.samples_of_batch if ranks.are_several else batch_size_of(inputs))
    if objects.train_metrics:
        with_outputs = [parts for _, parts in updates if parts[0].result.outputs is not None]
        for part in with_outputs[-1] if with_outputs else updates[-1][1]:
            objects.train_metrics.update(required_outputs(step, part.result), part.targets)


def backward_for(state: State, step: CustomStep, name: str, loss: Tensor) -> None:
    """Compute the gradient of a loss for the parameters of one optimizer.

    The loss often depends on the parameters of other optimizers too. These parameters get no gradient.

    Raises:
        WrongResultError: the loss does not depend on a parameter of the optimizer.
    """
    if state.objects.scaler is not None:
        loss = state.objects.scaler.scale(loss)
    trainable = [param for param in parameters_of(state.objects.optimizers[name]) if param.requires_grad]
    if not trainable:  # all are frozen
        return
    loss.backward(inputs=trainable)
    if all(param.grad is None for param in trainable):
        cause = f"the loss of {name!r} does not depend on a parameter of this optimizer"
        raise WrongResultError(step.key, cause, "yield the name of the optimizer that the loss trains")


def yielded_losses(state: State, step: CustomStep, inputs: Any, targets: Any) -> Iterator[tuple[str, StepResult]]:
    """Yield each optimizer name that a step yields for a batch, with the checked result.

    Raises:
        WrongResultError: the step does not yield a pair, or yields an unknown name.
    """
    objects = state.objects
    generator = step(objects.model, inputs, targets, objects.loss_fn, state.progress)
    while True:
        with objects.ranks.together(), objects.autocast:
            item = next(generator, None)
        if item is None:
            return
        if not isinstance(item, tuple) or len(item) != 2:
            cause = f"it yields a {type(item).__name__}, expected a pair (optimizer name, loss)"
            raise WrongResultError(step.key, cause, f"the names are {', '.join(objects.optimizers)}")
        name, returned = item
        if name not in objects.optimizers:
            hint = did_you_mean(str(name), list(objects.optimizers))
            raise WrongResultError(step.key, f"it yields {name!r}, and there is no optimizer of this name", hint)
        yield name, step.check_result(returned)


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

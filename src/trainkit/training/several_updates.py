"""Training by a generator step, which updates the parameters of one optimizer after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of
from trainkit.core.spelling import did_you_mean
from trainkit.training.custom_step import CustomStep, StepResult
from trainkit.training.custom_training import (
    MicroBatchResult,
    add_scalars,
    results_of_all_ranks,
    total_loss,
    update_train_metrics,
)
from trainkit.training.objects import parameters_of
from trainkit.training.state import State
from trainkit.training.step import before_update, update
from trainkit.training.wrong_result import WrongResultError


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
    with_outputs = [parts for _, parts in updates if parts[0].result.outputs is not None]
    update_train_metrics(state, step, with_outputs[-1] if with_outputs else updates[-1][1])


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
    objects, names = state.objects, list(state.objects.optimizers)
    generator = step(objects.model, inputs, targets, objects.loss_fn, state.progress)
    while True:
        with objects.ranks.together() as agreement:
            if not batch_size_of(inputs):
                raise ConfigError(f"training_step: {step.place} needs samples on each rank, and a batch has fewer")
            with objects.autocast:
                item = next(generator, None)
            agreement.offer(0)
            if item is not None:
                name, result = _checked_pair(step, item, names)
                agreement.offer(1 + names.index(name))
        if len({*agreement.columns[0]}) > 1:
            raise WrongResultError(step.key, "it yields other losses on other ranks", "yield the same on each rank")
        if item is None:
            return
        yield name, result


def _checked_pair(step: CustomStep, item: Any, names: list[str]) -> tuple[str, StepResult]:
    """Return the optimizer name and the checked result that a step yields; see `yielded_losses`."""
    if not isinstance(item, tuple) or len(item) != 2:
        cause = f"it yields a {type(item).__name__}, expected a pair (optimizer name, loss)"
        raise WrongResultError(step.key, cause, f"the names are {', '.join(names)}")
    name, returned = item
    if name not in names:
        hint = did_you_mean(str(name), names)
        raise WrongResultError(step.key, f"it yields {name!r}, and there is no optimizer of this name", hint)
    return name, step.check_result(returned)

"""The parts of a training step beyond its five lines: micro batches, closures, clipping, loss scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of, join_rows, map_tensors, take_samples, tensors_in
from trainkit.data.batch_order import Share
from trainkit.data.prepare import Batch
from trainkit.optim.chained import ChainedOptimizer
from trainkit.training.finite import check_step, gradient_values
from trainkit.training.last_step import record_last_step
from trainkit.training.losses import denominator, loss_contribution
from trainkit.training.metric_set import detach
from trainkit.training.objects import Objects, parameters_of
from trainkit.training.overlap import begin_overlap, overlapped_model, sum_in_backward
from trainkit.training.sharding import clip_sharded_gradients, filling_batches, total_norm
from trainkit.training.state import Phase, State

LAST_BATCH_HINT = "write data.drop_last=on, or another batch_size, or sync_batchnorm=off"


def train_step_in_parts(state: State, inputs: Any, targets: Any) -> None:
    """Update the weights once from micro batches, with a scaler, or with an optimizer that evaluates the loss itself.

    Each micro batch's loss is weighted by its share of the whole denominator, so the gradient is that of the whole
    batch.
    """
    objects = state.objects
    kept: list[tuple[Any, Any]] = []

    def evaluate(*, first: bool) -> tuple[Tensor, Tensor | float]:
        return accumulate_gradient(state, inputs, targets, kept if objects.train_metrics and first else None)

    loss, weight = update_with(state, evaluate)
    for outputs, part_targets in of_all_ranks(kept, objects) if objects.train_metrics else ():
        objects.train_metrics.update(outputs, part_targets)
    state.progress.loss.update(loss, weight=weight)


class Evaluate(Protocol):
    """A function that accumulates the gradient of a batch, and returns its loss and the loss's denominator.

    An optimizer may call it several times in a step; `first` is true for the first call.
    """

    def __call__(self, *, first: bool) -> tuple[Tensor, Tensor | float]: ...


def update_with(state: State, evaluate: Evaluate) -> tuple[Tensor, Tensor | float]:
    """Update the weights once; return the loss and its denominator.

    If the optimizer evaluates the loss several times, the first evaluation counts.
    """
    objects = state.objects
    evaluations: list[tuple[Tensor, Tensor | float]] = []

    def closure() -> Tensor:
        objects.optimizer.zero_grad()
        loss, weight = evaluate(first=not evaluations)
        before_update(state, loss, weight, first=not evaluations)
        evaluations.append((loss, weight))
        return loss

    if objects.needs_closure:
        state.phase = Phase.UPDATING
        objects.optimizer.step(closure)  # type: ignore[arg-type,call-arg]  # torch declares that it returns a float
    else:
        closure()
        update(state)
    return evaluations[0]


def accumulate_gradient(
    state: State, inputs: Any, targets: Any, kept: list[tuple[Any, Any]] | None = None
) -> tuple[Tensor, Tensor | float]:
    """Return the loss of a batch and its denominator; if gradients are enabled, accumulate the gradient.

    With several ranks, `inputs` and `targets` are the share of this rank, and the rest is of the whole batch. The
    detached outputs and the targets of each micro batch are appended to `kept`, if it is given.
    """
    objects, samples = state.objects, batch_size_of(inputs)
    ranks = objects.ranks
    with ranks.together():
        own_denominator = denominator(objects.loss_fn, targets, samples) if samples else 0
    batch_denominator = ranks.sum_number(own_denominator, objects.device)
    total, last_outputs = torch.zeros((), device=objects.device), None
    model = overlapped_model(state) or objects.model
    summed = ranks.summed_gradients(objects.parameters, connected=objects.sharded)
    with summed if model is objects.model else nullcontext():
        for _, part_targets, outputs, loss in forward_in_parts(
            state, model, objects.loss_fn, inputs, targets, batch_denominator, shared=ranks.are_several
        ):
            if kept is not None:
                kept.append((detach(outputs), part_targets))
            if objects.may_overlap:
                last_outputs = detach(outputs)
            if loss is None and objects.synced is not None and torch.is_grad_enabled():
                backward_without_gradient(outputs)  # batch norm layers on other ranks wait for those of this rank
            del outputs
            if loss is None:
                continue
            if torch.is_grad_enabled():
                (loss if objects.scaler is None else objects.scaler.scale(loss)).backward()
            total = total + loss.detach()
        for part, _ in filling_batches(state, inputs, targets):
            with objects.autocast:
                outputs = objects.model(part)
            backward_without_gradient(outputs)
    begin_overlap(state, last_outputs)
    return ranks.sum(total.double() if ranks.are_several else total), batch_denominator


def of_all_ranks(parts: list[tuple[Any, Any]], objects: Objects) -> list[tuple[Any, Any]]:
    """Return pairs of outputs and targets of every rank, in the order of the samples of the batch, see `joined`."""
    if not objects.ranks.are_several:
        return parts
    gathered = objects.ranks.gather(map_tensors(parts, lambda tensor: tensor.cpu()))
    every = [map_tensors(part, lambda tensor: tensor.to(objects.device)) for share in gathered for part in share]
    return joined(every)


def joined(parts: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return pairs of outputs and targets as one pair of the whole batch, if their rows can be joined.

    Some metrics look at a batch as a whole. For example, those of torchmetrics take outputs from 0 to 1 only for
    probabilities.
    """
    rows = [{len(tensor) if tensor.dim() else 0 for tensor in tensors_in(part)} for part in parts]
    if len(parts) < 2 or any(len(of_part) != 1 for of_part in rows):
        return parts
    try:
        return [join_rows(parts)]
    except ValueError:
        return parts


def forward_in_parts(
    state: State,
    model: nn.Module,
    loss_fn: nn.Module,
    inputs: Any,
    targets: Any,
    batch_denominator: Tensor | float,
    *,
    shared: bool = False,
) -> Iterator[tuple[Any, Any, Any, Tensor | None]]:
    """Yield for each micro batch its inputs, its targets, its outputs, and what `loss_contribution` returns.

    With `shared`, `inputs` are the share of this rank, and `batch_denominator` is that of the whole batch.
    """
    samples, done, passes = batch_size_of(inputs), 0, number_of_passes(state)
    for part, part_targets in micro_batches(inputs, targets, state.progress.micro_batch, passes):
        count = batch_size_of(part)
        done += count
        sum_in_backward(model, last=done == samples)
        with state.objects.autocast:
            outputs = model(part)
            whole = None if count == samples and not shared else batch_denominator
            loss = loss_contribution(loss_fn, outputs, part_targets, count, whole)
        yield part, part_targets, outputs, loss
        del outputs, loss  # before the next forward pass needs memory


def backward_without_gradient(outputs: Any) -> None:
    """Run the backward pass of outputs that no loss uses, for the ranks that wait for it. It adds 0 to gradients."""
    used = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    if used:
        torch.autograd.backward(used, [torch.zeros_like(tensor) for tensor in used])


def number_of_passes(state: State) -> int | None:
    """Return the number of forward passes for a batch if it must be equal on all ranks, else None.

    Batch norm layers exchange their statistics in each pass.

    Raises:
        ConfigError: a rank has no sample for a pass.
    """
    progress, synced = state.progress, state.objects.synced
    if synced is None or state.phase is Phase.EVALUATING or not progress.largest_share:
        return None
    passes = math.ceil(progress.largest_share / (progress.micro_batch or progress.largest_share))
    if progress.smallest_share < passes:
        ranks, samples = state.objects.ranks.size, progress.samples_of_batch
        cause = f"a batch of {samples} samples in {passes} forward pass{'es' * (passes > 1)} on {ranks} ranks"
        hint = "write micro_batch=2 or more" if passes > 1 else LAST_BATCH_HINT
        raise ConfigError(f"{cause}: batch norm (model.{synced}) needs a sample on each rank in each pass", hint=hint)
    return passes


def micro_batches(inputs: Any, targets: Any, size: int | None, passes: int | None = None) -> Iterator[Batch]:
    """Yield a batch in parts of at most `size` samples, in order; with `passes`, in so many parts of similar sizes."""
    samples = batch_size_of(inputs)
    if not samples:  # another rank has the samples
        return
    if size is None or (size >= samples and passes in (None, 1)):
        yield inputs, targets  # whole, because sparse and 0-d tensors cannot be sliced
        return
    bounds = [slice(start, start + size) for start in range(0, samples, size)]
    if passes is not None:
        bounds = [Share(number, passes).bounds(samples) for number in range(passes)]
    for part in bounds:
        yield (
            take_samples(inputs, part.start, part.stop, samples),
            take_samples(targets, part.start, part.stop, samples),
        )


# ------------------------------------------------------------------- between backward and the update


def before_update(
    state: State,
    loss: Tensor,
    weight: Tensor | float,
    *,
    optimizer: Optimizer | ChainedOptimizer | None = None,
    first: bool = True,
) -> None:
    """Check the loss and the gradient, record and clip the gradient; after this call the weights may change.

    Args:
        state: the state, with gradients.
        loss: the loss of the batch, a scalar.
        weight: the denominator of the loss.
        optimizer: the optimizer that steps next, if it is not that of all parameters.
        first: this is the step's first evaluation of the loss. Further evaluations are not checked or recorded,
            because they belong to the optimizer's line search.

    Raises:
        NonFiniteError: the loss or the gradient is not finite, and `check_steps` is on.
    """
    objects = state.objects
    optimizer = optimizer or objects.optimizer
    if first and state.settings.check_steps:
        check_step(state, loss, weight, optimizer)
    if objects.scaler is not None and has_gradients(optimizer):
        objects.scaler.unscale_(optimizer)  # type: ignore[arg-type]  # chained optimizers step all or none
    if first and state.in_last_batch:
        record_last_step(state, gradient_norm(optimizer, objects))
    clip_gradients(state, optimizer)
    prepare_fused(optimizer)
    state.phase = Phase.UPDATING


def update(state: State, optimizer: Optimizer | ChainedOptimizer | None = None, *, last: bool = True) -> None:
    """Step the optimizer; with fp16, skip the step if the gradients overflowed, and halve the scale.

    On an accelerator a single fused optimizer decides this on the device. Any other optimizer synchronizes it.

    Args:
        state: the state, with gradients.
        optimizer: the optimizer, if it is not that of all parameters.
        last: no other optimizer follows in this step, so the scale may change.
    """
    objects = state.objects
    optimizer = optimizer or objects.optimizer
    if objects.scaler is None or not has_gradients(optimizer):
        optimizer.step()
        return
    objects.scaler.step(optimizer)  # type: ignore[arg-type]
    if last:
        objects.scaler.update()
    for each in objects.optimizers.values():
        each._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers warn after a skipped step


def has_gradients(optimizer: Optimizer | ChainedOptimizer) -> bool:
    """Return whether any parameter has a gradient."""
    return any(param.grad is not None for param in parameters_of(optimizer))


def gradient_norm(optimizer: Optimizer | ChainedOptimizer, objects: Objects) -> Tensor:
    """Return the norm of the gradient over the parameters of all groups, a scalar on the device."""
    present = [gradient_values(param.grad) for param in parameters_of(optimizer) if param.grad is not None]
    return total_norm(present, objects)


def clip_gradients(state: State, optimizer: Optimizer | ChainedOptimizer) -> None:
    """Clip each element of the gradient, then the norm of the gradient over all parameters of the optimizer."""
    settings = state.settings
    if state.objects.sharded:
        clip_sharded_gradients(state, parameters_of(optimizer))
        return
    if settings.clip_value is not None:
        nn.utils.clip_grad_value_(parameters_of(optimizer), settings.clip_value)
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters_of(optimizer), settings.clip_norm)


def prepare_fused(optimizer: Optimizer | ChainedOptimizer) -> None:
    """Prepare for fused optimizers: match gradient strides, zero-initialize SGD's momentum, turn off for sparse.

    Custom gradient hooks may return other strides than autograd does. Without dampening, a momentum of 0 equals
    torch's first step; torch leaves the momentum uninitialized if that step overflows in fp16.
    """
    inner = optimizer.optimizers.values() if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for optimizer in inner:
        for group in optimizer.param_groups:
            if not group.get("fused"):
                continue
            needs_momentum = bool(group.get("momentum")) and isinstance(optimizer, torch.optim.SGD)
            needs_momentum &= not group.get("dampening")
            for param in group["params"]:
                gradient = param.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    group["fused"], optimizer._step_supports_amp_scaling = None, False  # type: ignore[attr-defined]
                    break
                if gradient.stride() != param.stride() and not _same_memory_order(gradient, param):
                    param.grad = torch.empty_like(param).copy_(gradient)
                if needs_momentum and optimizer.state[param].get("momentum_buffer") is None:
                    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def _same_memory_order(a: Tensor, b: Tensor) -> bool:
    return all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))

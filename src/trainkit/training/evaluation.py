"""Validation: the loss, the accuracy and the metrics over a whole data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.core.pytree import batch_size_of
from trainkit.core.ranks import Ranks
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader
from trainkit.training.carried import carrying_modules, without_carried
from trainkit.training.custom_training import evaluation_results
from trainkit.training.hooks import call_hooks
from trainkit.training.interruption import interruptible, next_share, restore_buffers_if_stopped
from trainkit.training.losses import denominator, is_sum
from trainkit.training.metric_set import detach
from trainkit.training.metrics import Mean, Metrics, count_correct
from trainkit.training.oom import run_with_oom_split
from trainkit.training.sharding import filling_batches
from trainkit.training.state import Phase, State
from trainkit.training.step import forward_in_parts, of_all_ranks


@torch.no_grad()
def evaluate(
    state: State, loader: Loader, hooks: Sequence[Any] = (), on_outputs: Callable[[Any, Any], object] | None = None
) -> Metrics:
    """Return the loss, for classes the accuracy, and the other metrics over a whole data set.

    With `ema` the averaged weights are evaluated. Weights, RNG states and the carried state do not change. The
    function `on_outputs` gets the outputs and the targets of each micro batch, if there are outputs.
    """
    (model, loss_fn), metrics = state.objects.evaluated, state.objects.val_metrics
    model.eval()
    loss_fn.eval()
    device, is_custom = state.objects.device, state.objects.evaluation_step is not None
    loss, accuracy = Mean(device, summed=not is_custom and is_sum(loss_fn)), Mean(device, summed=True)
    means: dict[str, Mean] = {}
    ranks, batches = state.objects.ranks, loader.batches(0)
    carried = without_carried(carrying_modules(model) if state.objects.carrying else [])
    metrics.reset()
    needed = bool(metrics) or any(hasattr(hook, "on_val_batch") for hook in hooks)
    work = functools.partial(evaluate_batch, keep_outputs=needed or on_outputs is not None, needs_outputs=needed)
    with preserve_rng(), carried, restore_buffers_if_stopped(model, loss_fn), interruptible(state, Phase.EVALUATING):
        while (pair := next_share(state, batches)) is not None:
            inputs, targets = pair
            batch = run_with_oom_split(work, state, inputs, targets, hooks)
            for value, weight in batch.losses:
                loss.update(value, weight=weight)
            for name, value, weight in batch.scalars:
                means.setdefault(name, Mean(device)).update(value, weight=weight)
            for correct in batch.correct:
                accuracy.update(*correct)
            update_metrics(state, batch)
            for part, part_targets, outputs in batch.kept:
                call_hooks(hooks, "on_val_batch", state, part, part_targets, outputs)
                if on_outputs is not None:
                    on_outputs(outputs, part_targets)
        with ranks.together():
            values = metrics.compute()
        sum_over_ranks(ranks, loss, accuracy, means)
    counted = {"val/accuracy": accuracy.item()} if accuracy.has_values else {}
    return {"val/loss": loss.item()} | counted | {f"val/{name}": mean.item() for name, mean in means.items()} | values


def update_metrics(state: State, batch: BatchEvaluation) -> None:
    """Add the outputs of a batch to the metrics: those of all ranks."""
    metrics = state.objects.val_metrics
    if metrics:
        for outputs, targets in of_all_ranks([(outputs, targets) for _, targets, outputs in batch.kept], state.objects):
            metrics.update(outputs, targets)


def sum_over_ranks(ranks: Ranks, loss: Mean, accuracy: Mean, means: dict[str, Mean]) -> None:
    """Add the sums of the other ranks to each mean. A rank whose shares are empty lacks some of the names."""
    for name in {name for names in ranks.gather([*means]) for name in names}:
        means.setdefault(name, Mean(loss.device))
    for mean in (loss, accuracy, *(means[name] for name in sorted(means))):
        mean.sum_over(ranks)


@dataclass
class BatchEvaluation:
    """The results of the validation of a batch.

    Attributes:
        losses: mean losses and their denominators.
        correct: the results of `count_correct` for each micro batch, if there are classes.
        scalars: further means of an evaluation step: name, value, denominator.
        kept: for each micro batch the inputs, the targets and the outputs.
    """

    losses: list[tuple[Tensor, Any]]
    correct: list[tuple[Tensor, Tensor]]
    scalars: list[tuple[str, Tensor, Any]]
    kept: list[tuple[Any, Any, Any]]


def evaluate_batch(
    state: State, inputs: Any, targets: Any, *, keep_outputs: bool = False, needs_outputs: bool | None = None
) -> BatchEvaluation:
    """Return the loss of a batch, its correct predictions and its scalars; with `keep_outputs`, the outputs too.

    An evaluation step must return outputs if they are needed. `needs_outputs` is `keep_outputs` by default.
    """
    batch = BatchEvaluation([], [], [], [])
    is_sharded = state.objects.sharded
    with state.objects.ranks.together(connected=is_sharded):
        if batch_size_of(inputs) or is_sharded:  # otherwise other ranks have the samples
            needed = keep_outputs if needs_outputs is None else needs_outputs
            _evaluate_share(state, inputs, targets, batch, keep_outputs=keep_outputs, needs_outputs=needed)
    return batch


def _evaluate_share(
    state: State, inputs: Any, targets: Any, batch: BatchEvaluation, *, keep_outputs: bool, needs_outputs: bool
) -> None:
    """Add the results of a batch, or of the share of this rank, to `batch`; see `evaluate_batch`."""
    step = state.objects.evaluation_step
    if step is not None:
        for custom in evaluation_results(state, step, inputs, targets, needs_outputs=needs_outputs):
            batch.losses.append((custom.result.loss, custom.weight))
            batch.scalars.extend(custom.scalars)
            outputs = custom.result.outputs
            if outputs is not None:
                # The outputs of a custom step may be anything, so they are classes only if their shape says so.
                is_tensor = isinstance(outputs, Tensor) and outputs.dim() > 1
                are_classes = is_tensor and outputs.shape[1] == state.settings.classes
                part = (custom.inputs, custom.targets, outputs)
                _add_outputs(state, batch, part, count=are_classes, keep_outputs=keep_outputs)
        return
    model, loss_fn = state.objects.evaluated
    for part, _ in filling_batches(state, inputs, targets):
        with state.objects.autocast:
            model(part)
    if not batch_size_of(inputs):
        return
    batch_denominator = denominator(loss_fn, targets, batch_size_of(inputs))
    total = torch.zeros((), device=state.objects.device)
    for part, part_targets, outputs, loss in forward_in_parts(
        state, model, loss_fn, inputs, targets, batch_denominator
    ):
        total = total if loss is None else total + loss
        _add_outputs(state, batch, (part, part_targets, outputs), count=True, keep_outputs=keep_outputs)
    batch.losses.append((total, batch_denominator))


def _add_outputs(
    state: State, batch: BatchEvaluation, micro_batch: tuple[Any, Any, Any], *, count: bool, keep_outputs: bool
) -> None:
    """Add the outputs of a micro batch to the results of its batch.

    Args:
        state: the state of the training.
        batch: the results of the batch.
        micro_batch: the inputs, the targets and the outputs.
        count: count the correct predictions, if the loss is one of classes and no metric is called `accuracy`.
        keep_outputs: keep the outputs.
    """
    part, part_targets, outputs = micro_batch
    if count and "accuracy" not in state.objects.val_metrics.metrics:
        correct = count_correct(state.objects.evaluated[1], outputs, part_targets, state.settings.classes)
        batch.correct.extend([] if correct is None else [correct])
    if keep_outputs:
        batch.kept.append((part, part_targets, detach(outputs)))

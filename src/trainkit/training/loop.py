"""The training loop over a `State`: epochs, steps and validation."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.core.device import synchronize
from trainkit.core.errors import ConfigError, NonFiniteError, Stopped
from trainkit.core.pytree import batch_size_of
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.training.carried import carrying_modules, match_buffers, reset_carried, without_carried
from trainkit.training.custom_training import custom_train_step, evaluation_parts
from trainkit.training.finite import check_finite, check_scale, skip_batch
from trainkit.training.hooks import add_hook_metrics, call_hooks
from trainkit.training.last_step import last_step_metrics
from trainkit.training.losses import denominator, is_sum
from trainkit.training.metric_set import detach
from trainkit.training.metrics import CLOCKS, Mean, Metrics, count_correct
from trainkit.training.oom import run_with_oom_split
from trainkit.training.state import Phase, State
from trainkit.training.step import before_update, forward_in_parts, train_step_in_parts
from trainkit.training.tokens import count_tokens


def fit(state: State, train: Loader, val: Loader | None = None, hooks: list[Any] | None = None) -> None:
    """Train until the last epoch or step, until the time is over, or until early stopping.

    Args:
        state: new, or restored from a checkpoint.
        train: the loader of the training data.
        val: the loader of the validation data.
        hooks: objects with methods for any of the events in `hooks.EVENTS`.

    Raises:
        NonFiniteError: a loss or a gradient is not finite, and `on_nonfinite` does not allow this.
        Stopped: the error in `state.stop`, raised between two steps.
    """
    hooks, progress = hooks or [], state.progress
    progress.batches, progress.samples = len(train), train.samples
    state.loaders = {"train": train} | ({} if val is None else {"val": val})
    state.check_time()
    call_hooks(hooks, "on_start", state)
    while not state.done:
        progress.began = time.perf_counter()
        metrics = train_epoch(state, train, hooks)
        if val is not None:
            metrics |= evaluate(state, val, hooks)
        state.check_time()
        progress.is_provisional = state.ends_inside_epoch
        metrics = count_epoch(state, metrics)
        add_hook_metrics(hooks, state, metrics)
        finish_epoch(state, metrics)
        for hook in hooks:
            call_hooks([hook], "on_epoch_end", state, copy.deepcopy(metrics))  # the metrics are final
        check_finite(state, metrics)
    check_scale(state)
    call_hooks(hooks, "on_end", state)


def train_epoch(state: State, loader: Loader, hooks: list[Any]) -> Metrics:
    """Train on the remaining batches of an epoch; return the metrics of the whole epoch."""
    objects, progress = state.objects, state.progress
    objects.model.train()
    objects.loss_fn.train()
    state.set_frozen()
    if progress.batch == 0:
        reset_carried(objects.carrying)
    for inputs, targets in stoppable(state, loader.batches(progress.epoch, progress.batch)):
        try:
            run_with_oom_split(train_step, state, inputs, targets, hooks)
        except NonFiniteError as error:
            skip_batch(state, loader, inputs, error, hooks)
        else:
            if objects.ema is not None:
                if objects.carrying:
                    match_buffers(objects.ema.module, objects.trained)
                objects.ema.update_parameters(objects.trained)
            for scheduler in objects.step_schedulers:
                scheduler.step()  # type: ignore[call-arg]  # step schedulers take no metric
            progress.step += 1
            progress.seen += batch_size_of(inputs)
            progress.tokens += count_tokens(inputs)
        progress.batch += 1
        state.check_time()
        call_hooks(hooks, "on_step", state)
    return training_metrics(state)


def train_step(state: State, inputs: Any, targets: Any) -> None:
    """Update the weights once, from one batch."""
    state.phase = Phase.STEPPING
    objects, micro_batch = state.objects, state.progress.micro_batch
    model, loss_fn, optimizer = objects.model, objects.loss_fn, objects.optimizer
    samples = batch_size_of(inputs)
    if objects.training_step is not None:
        return custom_train_step(state, objects.training_step, inputs, targets)
    if objects.needs_closure or objects.scaler is not None or (micro_batch or math.inf) < samples:
        return train_step_in_parts(state, inputs, targets)

    weight = denominator(loss_fn, targets, samples)
    with objects.autocast:
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
    optimizer.zero_grad()
    loss.backward()
    before_update(state, loss, weight)
    optimizer.step()
    if objects.train_metrics:
        objects.train_metrics.update(outputs, targets)
    return state.progress.loss.update(loss, weight=weight)


def training_metrics(state: State) -> Metrics:
    """Return the metrics of the epoch's training."""
    objects, progress = state.objects, state.progress
    metrics: Metrics = {
        "train/loss": progress.loss.item(),
        "train/loss_sum": progress.loss.sum(),
        "train/samples": progress.seen,
        **{f"train/{name}": mean.item() for name, mean in progress.means.items()},
    }
    if state.settings.on_nonfinite != "stop":
        metrics["train/skipped"] = progress.skipped
    if objects.scaler is not None:
        metrics["train/scale"] = objects.scaler.get_scale()
    metrics |= objects.train_metrics.compute()
    synchronize(objects.device)
    seconds = progress.elapsed or math.inf
    metrics["samples_per_second"] = progress.seen / seconds
    if tokens := int(progress.tokens):
        metrics["tokens_per_second"] = tokens / seconds
    return metrics


def count_epoch(state: State, metrics: Metrics) -> Metrics:
    """Count the epoch; return its metrics with the epoch, the step, those of the last step, and the clocks."""
    progress = state.progress
    progress.epoch += 1
    counts = {"epoch": progress.epoch, "step": progress.step}
    clocks = {"seconds": progress.elapsed, **{name: metrics.pop(name) for name in CLOCKS if name in metrics}}
    unreadable = sum(map(len, progress.unreadable.values()))
    skipped = {"unreadable": unreadable} if unreadable else {}
    return {**counts, **metrics, **last_step_metrics(state), **clocks, **skipped}


def finish_epoch(state: State, metrics: Metrics) -> None:
    """Update the best epoch and the patience, step the epoch schedulers, and begin the next epoch.

    Raises:
        ConfigError: the metrics do not contain the monitored number.
    """
    progress, monitor = state.progress, state.settings.monitor
    value = monitored_value(monitor, metrics)
    if _improves(state, value, (progress.best or {}).get(monitor)):
        progress.best = metrics
    if _improves(state, value, progress.patience_reference, by=state.settings.min_delta):
        progress.patience_reference, progress.epochs_since_best = value, 0
    else:
        progress.epochs_since_best += 1
    for scheduler in state.objects.epoch_schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(value)
        else:
            scheduler.step()
    state.begin_epoch()


def monitored_value(monitor: str, metrics: Metrics) -> float:
    """Return the value of the monitored metric.

    Raises:
        ConfigError: the metrics do not contain it, or it is not a number.
    """
    value = metrics.get(monitor)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    choices = [name for name, number in metrics.items() if isinstance(number, float) and name not in CLOCKS]
    cause = f"is {value!r}, not a number" if monitor in metrics else "this run has no such metric"
    raise ConfigError(f"monitor.metric={monitor}: {cause}", hint=f"choose from {', '.join(choices)}")


def _improves(state: State, value: float, reference: float | None, by: float = 0.0) -> bool:
    sign = 1 if state.settings.mode == "min" else -1
    return math.isfinite(value) and (reference is None or sign * value < sign * reference - by)


# ------------------------------------------------------------------------------------- validation


@torch.no_grad()
def evaluate(state: State, loader: Loader, hooks: Sequence[Any] = ()) -> Metrics:
    """Return the loss, for classes the accuracy, and the other metrics over a whole data set.

    With `ema` the averaged weights are evaluated. Weights, RNG states and the carried state do not change.
    """
    (model, loss_fn), metrics = state.objects.evaluated, state.objects.val_metrics
    model.eval()
    loss_fn.eval()
    device, is_custom = state.objects.device, state.objects.evaluation_step is not None
    loss, accuracy = Mean(device, summed=not is_custom and is_sum(loss_fn)), Mean(device, summed=True)
    means: dict[str, Mean] = {}
    has_accuracy = False
    batches = loader.batches(0)
    carried = without_carried(carrying_modules(model) if state.objects.carrying else [])
    metrics.reset()
    keep = bool(metrics) or any(hasattr(hook, "on_val_batch") for hook in hooks)
    work = functools.partial(evaluate_batch, keep=keep)
    with preserve_rng(), carried, restore_buffers_if_stopped(model, loss_fn), interruptible(state, Phase.EVALUATING):
        for inputs, targets in batches:
            batch = run_with_oom_split(work, state, inputs, targets, hooks)
            for value, weight in batch.losses:
                loss.update(value, weight=weight)
            for name, value, weight in batch.scalars:
                means.setdefault(name, Mean(device)).update(value, weight=weight)
            for correct in batch.correct:
                has_accuracy = True
                accuracy.update(*correct)
            for part, part_targets, outputs in batch.kept:
                metrics.update(outputs, part_targets)
                call_hooks(hooks, "on_val_batch", state, part, part_targets, outputs)
        values = metrics.compute()
    numbers = {f"val/{name}": mean.item() for name, mean in means.items()}
    return {"val/loss": loss.item()} | ({"val/accuracy": accuracy.item()} if has_accuracy else {}) | numbers | values


@dataclass
class Evaluated:
    """What the validation of a batch gives.

    Attributes:
        losses: means and their denominators.
        correct: what `count_correct` returns for each micro batch, if there are classes.
        scalars: further means of an evaluation step: name, value, denominator.
        kept: for each micro batch the inputs, the targets and the outputs.
    """

    losses: list[tuple[Tensor, Any]]
    correct: list[tuple[Tensor, Tensor]]
    scalars: list[tuple[str, Tensor, Any]]
    kept: list[tuple[Any, Any, Any]]


def evaluate_batch(state: State, inputs: Any, targets: Any, *, keep: bool = False) -> Evaluated:
    """Return the loss of a batch and the rest of `Evaluated`. The outputs are kept only with `keep`."""
    model, loss_fn = state.objects.evaluated
    classes, step = state.settings.classes, state.objects.evaluation_step
    counts_accuracy = "accuracy" not in state.objects.val_metrics.metrics
    batch = Evaluated([], [], [], [])

    def add_outputs(part: Any, part_targets: Any, outputs: Any) -> None:
        are_classes = step is None or (
            isinstance(outputs, Tensor) and outputs.dim() > 1 and outputs.shape[1] == classes
        )
        correct = count_correct(loss_fn, outputs, part_targets, classes) if counts_accuracy and are_classes else None
        batch.correct.extend([] if correct is None else [correct])
        if keep:
            batch.kept.append((part, part_targets, detach(outputs)))

    if step is not None:
        for custom in evaluation_parts(state, step, inputs, targets, outputs=keep):
            batch.losses.append((custom.result.loss, custom.weight))
            batch.scalars.extend(custom.scalars)
            if custom.result.outputs is not None:  # which may be anything
                add_outputs(custom.inputs, custom.targets, custom.result.outputs)
        return batch
    batch_denominator = denominator(loss_fn, targets, batch_size_of(inputs))
    total = torch.zeros((), device=state.objects.device)
    for part, part_targets, outputs, loss in forward_in_parts(
        state, model, loss_fn, inputs, targets, batch_denominator
    ):
        total = total if loss is None else total + loss
        add_outputs(part, part_targets, outputs)
    batch.losses.append((total, batch_denominator))
    return batch


# -------------------------------------------------------------------------------------- signals


def stoppable(state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches up to the last step; a signal stops the training while the loop waits for a batch."""
    while not state.at_limit:
        with interruptible(state, Phase.WAITING):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def interruptible(state: State, phase: Phase) -> Iterator[None]:
    """Set the phase for the block, in which a signal handler may raise `state.stop`.

    Raises:
        Stopped: a stop was requested earlier, or in the block and an `except` has swallowed it.
    """
    if state.stop is not None:
        raise state.stop
    before, state.phase = state.phase, phase
    try:
        yield
    finally:
        state.phase = before
    if state.stop is not None:
        raise state.stop


@contextmanager
def restore_buffers_if_stopped(*modules: nn.Module) -> Iterator[None]:
    """Restore the modules' buffers if the block is stopped, because the validation will start again."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    except Stopped:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise

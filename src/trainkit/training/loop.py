"""The training loop over a `State`: epochs and steps."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.core.device import synchronize
from trainkit.core.errors import ConfigError, NonFiniteError
from trainkit.core.pytree import batch_size_of
from trainkit.data.loaders import Loader
from trainkit.training.carried import match_buffers, reset_carried
from trainkit.training.custom_training import custom_train_step
from trainkit.training.evaluation import evaluate
from trainkit.training.finite import check_finite, check_scale, skip_batch
from trainkit.training.hooks import add_hook_metrics, call_hooks
from trainkit.training.interruption import share_unreadable, stoppable_batches
from trainkit.training.last_step import last_step_metrics
from trainkit.training.losses import denominator
from trainkit.training.metrics import CLOCKS, Metrics
from trainkit.training.oom import run_with_oom_split
from trainkit.training.several_updates import update_each_optimizer
from trainkit.training.state import Phase, State
from trainkit.training.step import before_update, number_of_passes, train_step_in_parts
from trainkit.training.sync_batchnorm import copy_first_buffers


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
        with state.objects.ranks.together():
            add_hook_metrics(hooks, state, metrics)
        metrics = state.objects.ranks.first(metrics)  # the clocks of the ranks differ
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
    for inputs, targets in stoppable_batches(state, loader.batches(progress.epoch, progress.batch)):
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
            progress.seen += progress.samples_of_batch
            progress.tokens += progress.tokens_of_batch
        progress.batch += 1
        state.check_time()
        call_hooks(hooks, "on_step", state)
    copy_first_buffers(objects)
    return training_metrics(state)


def train_step(state: State, inputs: Any, targets: Any) -> None:
    """Update the weights once, from one batch."""
    state.phase = Phase.STEPPING
    objects, micro_batch = state.objects, state.progress.micro_batch
    model, loss_fn, optimizer = objects.model, objects.loss_fn, objects.optimizer
    samples = batch_size_of(inputs)
    number_of_passes(state)  # a rank without a sample is an error on all ranks
    if objects.training_step is not None:
        step = update_each_optimizer if objects.training_step.is_generator else custom_train_step
        return step(state, objects.training_step, inputs, targets)
    in_parts = objects.ranks.are_several or (micro_batch or math.inf) < samples
    if in_parts or objects.needs_closure or objects.scaler is not None:
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
    share_unreadable(state)
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
    if _improves(state, value, progress.patience_reference, min_delta=state.settings.min_delta):
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


def _improves(state: State, value: float, reference: float | None, min_delta: float = 0.0) -> bool:
    sign = 1 if state.settings.mode == "min" else -1
    return math.isfinite(value) and (reference is None or sign * value < sign * reference - min_delta)

"""The training loop over a `State`: one step, one epoch, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.core.device import synchronize
from trainkit.core.errors import ConfigError, NonFiniteError, Problem, Stopped
from trainkit.core.pytree import batch_size_of
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import denominator, is_sum
from trainkit.training.metrics import Mean, predicted_right
from trainkit.training.state import Metrics, Phase, State
from trainkit.training.step import (
    before_update,
    last_step_metrics,
    micro_batches,
    record_last_step,
    run_with_oom_split,
    train_step_in_parts,
)

MAX_SKIPPED = 10  # batches of an epoch that on_nonfinite=skip leaves out, or 1 in 100 of them
MAX_ROLLBACKS = 3  # in an epoch
MIN_SCALE = 2.0**-10  # of the loss in fp16; it begins at 2**16 and is halved at each overflow


def fit(state: State, train: Loader, val: Loader | None = None, hooks: list[Any] | None = None) -> None:
    """Train from where the state stands to the last epoch, or until early stopping.

    Hooks are objects with methods for any of the events in `hooks.EVENTS`.

    Raises:
        NonFiniteError: a loss or a gradient is, which `on_nonfinite` does not settle.
        Stopped: `state.stop`, as soon as no step is under way.
    """
    hooks = hooks or []
    state.progress.batches, state.progress.samples = len(train), train.samples
    call_hooks(hooks, "on_start", state)
    while not state.done:
        state.progress.began = time.perf_counter()
        metrics = train_epoch(state, train, hooks)
        if val is not None:
            metrics |= evaluate(state, val, hooks)
        metrics["seconds"] = state.progress.elapsed
        metrics = finish_epoch(state, metrics)
        call_hooks(hooks, "on_epoch", state, metrics)
        check_finite(state, metrics)
    if (
        state.objects.scaler is not None
        and state.progress.step >= 10
        and state.objects.scaler.get_scale() == 2.0 ** (16 - state.progress.step)
    ):
        raise never_finite(state.objects.scaler.get_scale())  # not one update
    call_hooks(hooks, "on_end", state)


def train_epoch(state: State, loader: Loader, hooks: list[Any]) -> Metrics:
    """What is left of one pass over the training set; the metrics of the whole."""
    state.objects.model.train()
    state.objects.loss_fn.train()
    for inputs, targets in waiting(state, loader.batches(state.progress.epoch, state.progress.batch)):
        try:
            run_with_oom_split(train_step, state, inputs, targets, hooks)
        except NonFiniteError as error:
            skip_batch(state, loader, inputs, error, hooks)
        else:
            if state.objects.ema is not None:
                state.objects.ema.update_parameters(state.objects.trained)
            for scheduler in state.objects.step_schedulers:
                scheduler.step()  # type: ignore[call-arg]  # none of them needs a metric
            state.progress.step += 1
            state.progress.seen += batch_size_of(inputs)
        state.progress.batch += 1
        call_hooks(hooks, "on_step", state)
    metrics = {
        "train/loss": state.progress.loss.item(),
        "train/loss_sum": state.progress.loss.sum(),
        "train/samples": state.progress.seen,
    }
    if state.settings.on_nonfinite != "stop":
        metrics["train/skipped"] = state.progress.skipped
    if state.objects.scaler is not None:
        metrics["train/scale"] = state.objects.scaler.get_scale()
    synchronize(state.objects.device)
    metrics["samples_per_second"] = state.progress.seen / (state.progress.elapsed or math.inf)
    return metrics


def waiting(state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; a training that is asked to stop does so while it waits for one."""
    while True:
        with interruptible(state, Phase.WAITING):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def interruptible(state: State, phase: Phase) -> Iterator[None]:
    """No step is under way inside: whoever asks the training to stop may raise `state.stop` there.

    Raises:
        Stopped: it was asked to before, or meanwhile and somebody's `except` has swallowed it.
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


def train_step(state: State, inputs: Any, targets: Any) -> None:
    """One update of the weights by one batch: the five lines of every tutorial."""
    state.phase = Phase.STEPPING
    model, loss_fn, optimizer = state.objects.model, state.objects.loss_fn, state.objects.optimizer
    samples = batch_size_of(inputs)
    if (
        state.objects.needs_closure
        or state.objects.scaler is not None
        or (state.progress.micro_batch or math.inf) < samples
    ):
        return train_step_in_parts(state, inputs, targets)

    weight = denominator(loss_fn, targets, samples)
    with state.objects.autocast:
        loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    before_update(state, loss, weight)
    optimizer.step()
    return state.progress.loss.update(loss, weight=weight)


@torch.no_grad()
def evaluate(state: State, loader: Loader, hooks: Sequence[Any] = ()) -> Metrics:
    """The loss and, for classes, the accuracy over a whole data set, without touching the weights.

    With `ema` these are of the averaged weights. What it draws at random changes no draw of the training.
    """
    model, loss_fn = state.objects.evaluated
    model.eval()
    loss_fn.eval()
    loss, accuracy = Mean(state.objects.device, summed=is_sum(loss_fn)), Mean(state.objects.device, summed=True)
    judged = False
    batches = loader.batches(0)
    with preserve_rng(), buffers_kept_if_stopped(model, loss_fn), interruptible(state, Phase.EVALUATING):
        for inputs, targets in batches:
            for value, weight, right in run_with_oom_split(evaluate_batch, state, inputs, targets, hooks):
                loss.update(value, weight=weight)
                if right is not None:
                    judged = True
                    accuracy.update(*right)
    return {"val/loss": loss.item()} | ({"val/accuracy": accuracy.item()} if judged else {})


@contextmanager
def buffers_kept_if_stopped(*modules: nn.Module) -> Iterator[None]:
    """Undo what half a validation has done to buffers: it will be done again from its start."""
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    except Stopped:
        for buffer, before in kept:
            buffer.copy_(before)
        raise


def finish_epoch(state: State, metrics: Metrics) -> Metrics:
    """Count the epoch, judge it by the monitored metric, step a scheduler that goes by epochs."""
    state.progress.epoch += 1
    clock = {name: metrics.pop(name) for name in ("seconds", "samples_per_second")}
    metrics = {
        "epoch": state.progress.epoch,
        "step": state.progress.step,
        **metrics,
        **last_step_metrics(state),
        **clock,
    }
    if state.settings.monitor not in metrics:
        there = ", ".join(name for name in metrics if name.startswith(("train/", "val/")))
        raise ConfigError(
            f"monitor.metric={state.settings.monitor}: this run has no such metric", hint=f"there is: {there}"
        )
    value = metrics[state.settings.monitor]
    if _better(state, value, state.progress.best[state.settings.monitor] if state.progress.best else None):
        state.progress.best = metrics
    if _better(state, value, state.progress.patience_reference, by=state.settings.min_delta):
        state.progress.patience_reference, state.progress.epochs_since_best = value, 0
    else:
        state.progress.epochs_since_best += 1
    for scheduler in state.objects.epoch_schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(value)
        else:
            scheduler.step()
    state.begin_epoch()
    return metrics


def _better(state: State, value: float, than: float | None, by: float = 0.0) -> bool:
    sign = 1 if state.settings.mode == "min" else -1
    return math.isfinite(value) and (than is None or sign * value < sign * than - by)


def evaluate_batch(state: State, inputs: Any, targets: Any) -> list[tuple[Tensor, Any, Any]]:
    """For each micro batch: the loss, its denominator, and what was predicted right."""
    model, loss_fn = state.objects.evaluated
    judged = []
    for part, part_targets in micro_batches(inputs, targets, state.progress.micro_batch):
        with state.objects.autocast:
            outputs = model(part)
            loss = loss_fn(outputs, part_targets)
        weight = denominator(loss_fn, part_targets, batch_size_of(part))
        judged.append((loss, weight, predicted_right(loss_fn, outputs, part_targets)))
    return judged


# ------------------------------------------------------------------------- what is not finite


def skip_batch(state: State, loader: Loader, inputs: Any, error: NonFiniteError, hooks: Sequence[Any]) -> None:
    """Go on without a batch whose loss or gradient is not finite, or raise the error with what the batch was.

    Nothing of the batch is kept but that the random generators have moved on. With `on_nonfinite`
    rollback, who keeps the checkpoints puts older weights back when told.
    """
    epoch, number = state.progress.epoch, state.progress.batch
    batch = f"batch {number + 1} of epoch {epoch + 1}, {loader.describe(epoch, number, inputs)}"
    told = NonFiniteError(*(Problem(f"{problem.cause} ({batch})", problem.hint) for problem in error.problems))
    most = (
        MAX_ROLLBACKS if state.settings.on_nonfinite == "rollback" else max(MAX_SKIPPED, state.progress.batches // 100)
    )
    if state.settings.on_nonfinite == "stop" or state.progress.skipped >= most:
        raise told from error
    state.progress.skipped += 1
    state.objects.optimizer.zero_grad()
    if state.progress.batch + 1 >= state.progress.batches:
        record_last_step(state, None)
    call_hooks(hooks, "on_nonfinite", state, told)


def not_finite(state: State, metrics: Mapping[str, Any]) -> str | None:
    """The first of an epoch's losses, and where steps are not looked at its last gradient, that is not finite."""
    looked_at = state.settings.check_steps or state.objects.scaler is not None
    names = ("train/loss", "val/loss") if looked_at else ("train/loss", "grad_norm", "val/loss")
    values = {name: metrics.get(name) for name in names}
    return next((name for name, value in values.items() if value is not None and not math.isfinite(value)), None)


def never_finite(scale: float) -> NonFiniteError:
    """What to say where no step in fp16 has made an update."""
    return NonFiniteError(
        f"the gradient overflowed in fp16 at each scale of the loss that was tried, down to {scale:.1e}",
        hint="write precision=bf16, or look for NaN in the gradient with precision=fp32",
    )


def check_finite(state: State, metrics: Metrics) -> None:
    """Raise `NonFiniteError` where a loss or the gradient is NaN or infinite."""
    if metrics.get("train/scale", 1.0) < MIN_SCALE:
        raise never_finite(metrics["train/scale"])
    name = not_finite(state, metrics)
    if name is not None:
        raise NonFiniteError(
            f"{name} is {metrics[name]} in epoch {metrics['epoch']}",
            hint="lower lr, or set clip_norm=1; if epoch 1 has it already, look for NaN in the data",
        )

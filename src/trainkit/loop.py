"""The training loop: what a training is (`State`), one step, one epoch, evaluation."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.device import random_state_kept, wait
from trainkit.errors import ConfigError, NonFiniteError, Problem, Stopped
from trainkit.hooks import tell
from trainkit.loaders import Batch, Loader, batch_size_of
from trainkit.losses import denominator, is_sum
from trainkit.metrics import Mean, predicted_right
from trainkit.optim import ChainedOptimizer
from trainkit.schedulers import Scheduler
from trainkit.steps import (
    before_update,
    fitting,
    micro_batches,
    observe_step,
    report_of_step,
    takes_batch_statistics,
    train_step_in_parts,
)

Metrics = dict[str, Any]
MOST_SKIPPED = 10  # batches of an epoch that on_nonfinite=skip leaves out, or 1 in 100 of them
MOST_ROLLBACKS = 3  # in an epoch


@dataclass
class State:
    """All that a training is, in one place; hooks are given it.

    The first fields are what the config built, the last are where the training stands.
    """

    model: nn.Module
    loss_fn: nn.Module
    optimizer: Optimizer | ChainedOptimizer
    device: torch.device
    epochs: int
    step_schedulers: list[Scheduler] = field(default_factory=list)
    epoch_schedulers: list[Scheduler] = field(default_factory=list)
    ema_decay: float | None = None
    micro_batch: int | None = None
    on_oom: str = "stop"  # or split; auto splits but where layers take batch statistics
    on_nonfinite: str = "stop"  # or leave the batch out: skip goes on as it is, rollback from older weights
    clip_norm: float | None = None
    clip_value: float | None = None
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int | None = None
    min_delta: float = 0.0
    watch: dict[str, nn.Parameter] = field(default_factory=dict)

    epoch: int = 0  # epochs done
    batch: int = 0  # batches of this epoch done
    batches: int = 0  # batches of an epoch
    samples: int = 0  # samples of an epoch
    step: int = 0  # optimizer updates done
    loss: Mean = field(init=False)  # of this epoch so far
    seen: int = 0  # samples of this epoch trained on
    skipped: int = 0  # batches of this epoch left out, as their loss or gradient was not finite
    began: float = field(default_factory=time.perf_counter)  # when this epoch began, if it had been without a break
    best: Metrics | None = None  # of the epoch with the best monitored value
    epochs_since_best: int = 0
    rates: Metrics = field(default_factory=dict)  # the learning rates of the last step
    grad_norm: Tensor | None = None  # of the epoch's last step, before clipping
    gradients: Metrics = field(default_factory=dict)  # of the watched parameters, likewise
    patience_reference: float | None = None  # the value that early stopping compares with: the best by min_delta
    stopped_early: bool = False
    updating: bool = False  # the step is past its last gradient: it cannot be taken again
    stop: Stopped | None = None  # a signal has asked for it
    interruptible: bool = False  # no step is under way: it may stop at once
    checks_steps: bool = field(init=False)  # whether each step's loss and gradient are looked at before its update
    needs_closure: bool = field(init=False)  # the optimizer evaluates the loss itself, as LBFGS does
    trained: nn.ModuleDict = field(init=False)  # model and loss
    ema: AveragedModel | None = None  # their moving average
    sees_batches: bool = False  # some layer takes batch statistics
    statistics: list[Tensor] = field(default_factory=list)  # of the batches seen, which a step taken again counts twice

    def __post_init__(self) -> None:
        self.begin_epoch()
        # To ask an accelerator is to wait for it, so that is done for those alone who asked for more than to stop.
        self.checks_steps = self.device.type == "cpu" or self.on_nonfinite != "stop"
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is closure.empty
        self.trained = nn.ModuleDict({"model": self.model, "loss": self.loss_fn})
        norms = [module for module in self.model.modules() if takes_batch_statistics(module)]
        self.sees_batches = bool(norms)
        if self.on_oom == "auto":
            self.on_oom = "stop" if norms else "split"
        if self.on_oom == "split" or self.on_nonfinite != "stop":
            self.statistics = [tensor for module in norms for tensor in module.buffers(recurse=False)]
        if self.ema_decay is not None:
            self.ema = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The model and the loss that are validated: with `ema`, their moving averages."""
        modules: Any = self.trained if self.ema is None else self.ema.module
        return modules["model"], modules["loss"]

    def begin_epoch(self) -> None:
        """Count from nothing."""
        self.loss = Mean(self.device, summed=is_sum(self.loss_fn))
        self.batch = self.seen = self.skipped = 0
        self.began = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.epochs or self.stopped_early


def fit(state: State, train: Loader, val: Loader | None = None, hooks: list[Any] | None = None) -> None:
    """Train from where the state stands to the last epoch, or until early stopping.

    Hooks are objects with methods for any of the events in `hooks.EVENTS`.

    Raises:
        NonFiniteError: a loss or a gradient is, which `on_nonfinite` does not settle.
        Stopped: `state.stop`, as soon as no step is under way.
    """
    hooks = hooks or []
    state.batches, state.samples = len(train), train.samples
    tell(hooks, "on_start", state)
    while not state.done:
        metrics = train_epoch(state, train, hooks)
        if val is not None:
            metrics |= evaluate(state, val, hooks)
        metrics["seconds"] = time.perf_counter() - state.began
        metrics = finish_epoch(state, metrics)
        tell(hooks, "on_epoch", state, metrics)
        check_finite(state, metrics)
    tell(hooks, "on_end", state)


def train_epoch(state: State, loader: Loader, hooks: list[Any]) -> Metrics:
    """What is left of one pass over the training set; the metrics of the whole."""
    state.model.train()
    state.loss_fn.train()
    for inputs, targets in waiting(state, loader.batches(state.epoch, state.batch)):
        try:
            fitting(train_step, state, inputs, targets, hooks)
        except NonFiniteError as error:
            leave_out(state, loader, inputs, error, hooks)
        else:
            if state.ema is not None:
                state.ema.update_parameters(state.trained)
            for scheduler in state.step_schedulers:
                scheduler.step()  # type: ignore[call-arg]  # none of them needs a metric
            state.step += 1
            state.seen += batch_size_of(inputs)
        state.batch += 1
        tell(hooks, "on_step", state)
    metrics = {
        "train/loss": state.loss.item(),
        "train/loss_sum": state.loss.sum(),
        "train/samples": state.seen,
    }
    if state.on_nonfinite != "stop":
        metrics["train/skipped"] = state.skipped
    wait(state.device)
    metrics["samples_per_second"] = state.seen / (time.perf_counter() - state.began)
    return metrics


def waiting(state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; a training that is asked to stop does so while it waits for one."""
    while True:
        with interruptible(state):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def interruptible(state: State) -> Iterator[None]:
    """No step is under way inside: whoever asks the training to stop may raise `state.stop` there.

    Raises:
        Stopped: it was asked to before.
    """
    if state.stop is not None:
        raise state.stop
    state.interruptible = True
    try:
        yield
    finally:
        state.interruptible = False


def train_step(state: State, inputs: Any, targets: Any) -> None:
    """One update of the weights by one batch: the five lines of every tutorial."""
    model, loss_fn, optimizer = state.model, state.loss_fn, state.optimizer
    if state.needs_closure or (state.micro_batch or math.inf) < batch_size_of(inputs):
        return train_step_in_parts(state, inputs, targets)

    weight = denominator(loss_fn, targets, batch_size_of(inputs))
    loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    before_update(state, loss, weight)
    optimizer.step()
    return state.loss.update(loss, weight=weight)


@torch.no_grad()
def evaluate(state: State, loader: Loader, hooks: Sequence[Any] = ()) -> Metrics:
    """The loss and, for classes, the accuracy over a whole data set, without touching the weights.

    With `ema` these are of the averaged weights. What it draws at random changes no draw of the training.
    """
    model, loss_fn = state.evaluated
    model.eval()
    loss_fn.eval()
    loss, accuracy = Mean(state.device, summed=is_sum(loss_fn)), Mean(state.device, summed=True)
    judged = False
    with random_state_kept(), interruptible(state):
        for inputs, targets in loader.batches(0):
            for value, weight, right in fitting(evaluate_batch, state, inputs, targets, hooks):
                loss.update(value, weight=weight)
                if right is not None:
                    judged = True
                    accuracy.update(*right)
    return {"val/loss": loss.item()} | ({"val/accuracy": accuracy.item()} if judged else {})


def finish_epoch(state: State, metrics: Metrics) -> Metrics:
    """Count the epoch, judge it by the monitored metric, step a scheduler that goes by epochs."""
    state.epoch += 1
    clock = {name: metrics.pop(name) for name in ("seconds", "samples_per_second")}
    metrics = {"epoch": state.epoch, "step": state.step, **metrics, **report_of_step(state), **clock}
    if state.monitor not in metrics:
        there = ", ".join(name for name in metrics if name.startswith(("train/", "val/")))
        raise ConfigError(f"monitor.metric={state.monitor}: this run has no such metric", mend=f"there is: {there}")
    value = metrics[state.monitor]
    if _better(state, value, state.best[state.monitor] if state.best else None):
        state.best = metrics
    if _better(state, value, state.patience_reference, by=state.min_delta):
        state.patience_reference, state.epochs_since_best = value, 0
    else:
        state.epochs_since_best += 1
    state.stopped_early = state.patience is not None and state.epochs_since_best >= state.patience
    for scheduler in state.epoch_schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(value)
        else:
            scheduler.step()
    state.begin_epoch()
    return metrics


def _better(state: State, value: float, than: float | None, by: float = 0.0) -> bool:
    sign = 1 if state.mode == "min" else -1
    return math.isfinite(value) and (than is None or sign * value < sign * than - by)


def evaluate_batch(state: State, inputs: Any, targets: Any) -> list[tuple[Tensor, Any, Any]]:
    """For each micro batch: the loss, its denominator, and what was predicted right."""
    model, loss_fn = state.evaluated
    judged = []
    for part, part_targets in micro_batches(inputs, targets, state.micro_batch):
        outputs = model(part)
        weight = denominator(loss_fn, part_targets, batch_size_of(part))
        judged.append((loss_fn(outputs, part_targets), weight, predicted_right(loss_fn, outputs, part_targets)))
    return judged


# ------------------------------------------------------------------------- what is not finite


def leave_out(state: State, loader: Loader, inputs: Any, error: NonFiniteError, hooks: Sequence[Any]) -> None:
    """Go on without a batch whose loss or gradient is not finite, or raise the error with what the batch was.

    Nothing of the batch is kept but that the random generators have moved on. With `on_nonfinite`
    rollback, who keeps the checkpoints puts older weights back when told.
    """
    batch = f"batch {state.batch + 1} of epoch {state.epoch + 1}, {loader.describe(state.epoch, state.batch, inputs)}"
    told = NonFiniteError(*(Problem(f"{problem.cause} ({batch})", problem.mend) for problem in error.problems))
    most = MOST_ROLLBACKS if state.on_nonfinite == "rollback" else max(MOST_SKIPPED, state.batches // 100)
    if state.on_nonfinite == "stop" or state.skipped >= most:
        raise told from error
    state.skipped += 1
    state.optimizer.zero_grad()
    if state.batch + 1 >= state.batches:
        observe_step(state, None)
    tell(hooks, "on_nonfinite", state, told)


def not_finite(state: State, metrics: Mapping[str, Any]) -> str | None:
    """The first of an epoch's losses, and where steps are not looked at its last gradient, that is not finite."""
    names = ("train/loss", "val/loss") if state.checks_steps else ("train/loss", "grad_norm", "val/loss")
    values = {name: metrics.get(name) for name in names}
    return next((name for name, value in values.items() if value is not None and not math.isfinite(value)), None)


def check_finite(state: State, metrics: Metrics) -> None:
    """Raise `NonFiniteError` where a loss or the gradient is NaN or infinite."""
    name = not_finite(state, metrics)
    if name is not None:
        raise NonFiniteError(
            f"{name} is {metrics[name]} in epoch {metrics['epoch']}",
            mend="lower lr, or set clip_norm=1; if epoch 1 has it already, look for NaN in the data",
        )

"""The training loop: what a training is (`State`), one step, one epoch, evaluation."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.device import out_of_memory, release, wait
from trainkit.errors import ConfigError, NonFiniteError, OutOfMemoryError
from trainkit.loaders import Batch, Loader, batch_size_of, map_tensors
from trainkit.losses import denominator, is_sum, knows_sum, summing
from trainkit.metrics import Mean, predicted_right
from trainkit.optim import ChainedOptimizer
from trainkit.schedulers import Scheduler

Metrics = dict[str, Any]
Result = TypeVar("Result")
EVENTS = ("on_start", "on_step", "on_epoch", "on_end", "on_split")


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
    best: Metrics | None = None  # of the epoch with the best monitored value
    epochs_since_best: int = 0
    rates: Metrics = field(default_factory=dict)  # the learning rates of the last step
    grad_norm: Tensor | None = None  # of the epoch's last step, before clipping
    gradients: Metrics = field(default_factory=dict)  # of the watched parameters, likewise
    patience_reference: float | None = None  # the value that early stopping compares with: the best by min_delta
    stopped_early: bool = False
    updating: bool = False  # the step is past its last gradient: it cannot be taken again
    needs_closure: bool = field(init=False)  # the optimizer evaluates the loss itself, as LBFGS does
    trained: nn.ModuleDict = field(init=False)  # model and loss
    ema: AveragedModel | None = None  # their moving average
    sees_batches: bool = False  # some layer takes batch statistics
    statistics: list[Tensor] = field(default_factory=list)  # of the batches seen, which a step taken again counts twice

    def __post_init__(self) -> None:
        self.loss = Mean(self.device, summed=is_sum(self.loss_fn))
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is closure.empty
        self.trained = nn.ModuleDict({"model": self.model, "loss": self.loss_fn})
        norms = [module for module in self.model.modules() if takes_batch_statistics(module)]
        self.sees_batches = bool(norms)
        if self.on_oom == "auto":
            self.on_oom = "stop" if norms else "split"
        if self.on_oom == "split":
            self.statistics = [tensor for module in norms for tensor in module.buffers(recurse=False)]
        if self.ema_decay is not None:
            self.ema = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The model and the loss that are validated: with `ema`, their moving averages."""
        modules: Any = self.trained if self.ema is None else self.ema.module
        return modules["model"], modules["loss"]

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.epochs or self.stopped_early


def fit(state: State, train: Loader, val: Loader | None = None, hooks: list[Any] | None = None) -> None:
    """Train to the last epoch, or until early stopping.

    Hooks are objects with any of the methods `on_start(state)`, `on_step(state)`,
    `on_epoch(state, metrics)` and `on_end(state)`; metrics they add are kept.

    Raises:
        NonFiniteError: an epoch's losses or its last gradient are (its metrics are handed on first).
    """
    hooks = hooks or []
    state.batches, state.samples = len(train), train.samples
    tell(hooks, "on_start", state)
    while not state.done:
        began = time.perf_counter()
        metrics = train_epoch(state, train, hooks)
        if val is not None:
            metrics |= evaluate(state, val, hooks)
        metrics["seconds"] = time.perf_counter() - began
        metrics = finish_epoch(state, metrics)
        tell(hooks, "on_epoch", state, metrics)
        check_finite(metrics)
    tell(hooks, "on_end", state)


def train_epoch(state: State, loader: Loader, hooks: list[Any]) -> Metrics:
    """One pass over the training set; the metrics that it gave."""
    state.model.train()
    state.loss_fn.train()
    state.loss = Mean(state.device, summed=is_sum(state.loss_fn))
    state.batch = 0
    began = time.perf_counter()
    for inputs, targets in loader.batches(state.epoch):
        fitting(train_step, state, inputs, targets, hooks)
        if state.ema is not None:
            state.ema.update_parameters(state.trained)
        for scheduler in state.step_schedulers:
            scheduler.step()  # type: ignore[call-arg]  # none of them needs a metric
        state.batch += 1
        state.step += 1
        tell(hooks, "on_step", state)
    metrics = {
        "train/loss": state.loss.item(),
        "train/loss_sum": state.loss.sum(),
        "train/samples": loader.samples,
    }
    wait(state.device)
    metrics["samples_per_second"] = loader.samples / (time.perf_counter() - began)
    return metrics


def train_step(state: State, inputs: Any, targets: Any) -> None:
    """One update of the weights by one batch: the five lines of every tutorial."""
    model, loss_fn, optimizer = state.model, state.loss_fn, state.optimizer
    if state.needs_closure or (state.micro_batch or math.inf) < batch_size_of(inputs):
        return train_step_in_parts(state, inputs, targets)

    loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    before_update(state)
    optimizer.step()
    return state.loss.update(loss, weight=denominator(loss_fn, targets, batch_size_of(inputs)))


@torch.no_grad()
def evaluate(state: State, loader: Loader, hooks: Sequence[Any] = ()) -> Metrics:
    """The loss and, for classes, the accuracy over a whole data set, without touching the weights.

    With `ema` these are of the averaged weights.
    """
    model, loss_fn = state.evaluated
    model.eval()
    loss_fn.eval()
    loss, accuracy = Mean(state.device, summed=is_sum(loss_fn)), Mean(state.device, summed=True)
    judged = False
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


# ----------------------------------------------------- the same step in parts, or by a closure


def train_step_in_parts(state: State, inputs: Any, targets: Any) -> None:
    """The same update in micro batches, or where the optimizer evaluates the loss itself.

    Each micro batch's loss counts by its share of the whole step's denominator, so the gradient is
    that of the whole batch. Of an optimizer's several evaluations the first is the epoch's loss.
    """
    first: list[Tensor] = []

    def closure() -> Tensor:
        state.optimizer.zero_grad()
        total = loss_in_parts(state, inputs, targets)
        before_update(state, observe=not first)
        first.append(total)
        return total

    if state.needs_closure:
        state.updating = True
        state.optimizer.step(closure)  # type: ignore[arg-type,call-arg]  # torch says it returns a float
    else:
        closure()
        state.optimizer.step()
    state.loss.update(first[0], weight=denominator(state.loss_fn, targets, batch_size_of(inputs)))


def loss_in_parts(state: State, inputs: Any, targets: Any) -> Tensor:
    """The loss of a batch, one micro batch at a time; where gradients are on, each adds its own to what is there."""
    samples = batch_size_of(inputs)
    weight = denominator(state.loss_fn, targets, samples)
    total = torch.zeros((), device=state.device)
    for part, part_targets in micro_batches(inputs, targets, state.micro_batch):
        whole = batch_size_of(part) == samples
        loss = loss_of_part(state, part, part_targets, None if whole else weight)
        if loss is not None:
            if torch.is_grad_enabled():
                loss.backward()
            total = total + loss.detach()
    return total


def loss_of_part(state: State, inputs: Any, targets: Any, weight: Tensor | int | None) -> Tensor | None:
    """What a part of a batch adds to the loss of the whole, whose denominator is `weight`; None: nothing counts.

    Without a weight the part is the whole.
    """
    if weight is None:
        whole: Tensor = state.loss_fn(state.model(inputs), targets)
        return whole
    own = denominator(state.loss_fn, targets, batch_size_of(inputs))
    # Its mean would be 0 / 0. Only a loss of the user's own makes the device wait for this.
    if not knows_sum(state.loss_fn) and not is_sum(state.loss_fn) and own == 0:
        return None
    with summing(state.loss_fn) as summed:
        loss: Tensor = state.loss_fn(state.model(inputs), targets)
    if is_sum(state.loss_fn):
        return loss
    if not summed:
        loss = loss * own
    return loss / (torch.where(weight == 0, 1, weight) if isinstance(weight, Tensor) else weight)


def micro_batches(inputs: Any, targets: Any, size: int | None) -> Iterator[Batch]:
    """A batch in parts of at most `size` samples, in order."""
    samples = batch_size_of(inputs)
    for start in range(0, samples, size or samples):
        part = slice(start, start + (size or samples))
        yield map_tensors(inputs, lambda t, p=part: t[p]), map_tensors(targets, lambda t, p=part: t[p])  # type: ignore[misc]


def takes_batch_statistics(module: nn.Module) -> bool:
    """Whether a layer normalises by its batch, or keeps count of the batches it sees."""
    kept = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return kept or isinstance(module, nn.modules.batchnorm._BatchNorm)


def before_update(state: State, *, observe: bool = True) -> None:
    """Between backward and step: look at the gradient, bound it; from here on the weights may change."""
    if observe:
        observe_step(state)
    clip_gradients(state)
    state.updating = True


def clip_gradients(state: State) -> None:
    """Bound the gradient over the parameters of all groups: each element, then the whole's norm."""
    if state.clip_norm is None and state.clip_value is None:
        return
    params = [p for group in state.optimizer.param_groups for p in group["params"]]
    if state.clip_value is not None:
        nn.utils.clip_grad_value_(params, state.clip_value)
    if state.clip_norm is not None:
        nn.utils.clip_grad_norm_(params, state.clip_norm)


# --------------------------------------------------------------------------- where memory runs out


def fitting(
    work: Callable[[State, Any, Any], Result], state: State, inputs: Any, targets: Any, hooks: Sequence[Any]
) -> Result:
    """Do the work on a batch; where memory runs out, halve the micro batch and do it again.

    Raises:
        OutOfMemoryError: with `on_oom` stop, where one sample is too much, and where the weights may
            have begun to change.
    """
    kept = [(tensor, tensor.clone()) for tensor in state.statistics]
    while True:
        state.updating = False
        try:
            return work(state, inputs, targets)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            size = min(batch_size_of(inputs), state.micro_batch or math.inf)
            half = math.ceil(size / 2)
            if state.on_oom != "split" or state.updating or size == 1:
                effect = "of which batch norm sees each alone" if state.sees_batches else "which changes no number"
                mend = f"set micro_batch={half}, {effect}" if size > 1 else "take a smaller model"
                raise OutOfMemoryError(f"{state.device} ran out of memory", mend=mend) from error
        state.micro_batch = half
        state.optimizer.zero_grad()
        for tensor, before in kept:
            tensor.copy_(before)
        release(state.device)
        tell(hooks, "on_split", state)


# ------------------------------------------------------------------------- what is reported


def observe_step(state: State) -> None:
    """Keep what is reported of an epoch's last step: rates and gradient, before anything changes them."""
    if state.batch + 1 < state.batches:
        return
    groups = enumerate(state.optimizer.param_groups)
    rates = {f"lr/{group.get('name', number)}": group.get("lr") for number, group in groups}
    state.rates = {name: float(rate) for name, rate in rates.items() if rate is not None}
    params = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.grad_norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    state.gradients = {f"grad/{name}": number_of(tensor.grad) for name, tensor in state.watch.items()}


def report_of_step(state: State) -> Metrics:
    """The learning rates, the gradient's norm and the watched parameters, as the last step had them.

    A parameter with several elements is given by its norm, and so is its gradient.
    """
    values = {f"param/{name}": number_of(tensor) for name, tensor in state.watch.items()}
    return {**state.rates, "grad_norm": number_of(state.grad_norm), **values, **state.gradients}


def number_of(tensor: Tensor | None) -> float | None:
    """A tensor of one element by its value, any other by its norm."""
    if tensor is None:
        return None
    return float(tensor.item() if tensor.numel() == 1 and not tensor.is_complex() else tensor.norm().item())


def check_finite(metrics: Metrics) -> None:
    """Raise `NonFiniteError` where a loss or the gradient is NaN or infinite."""
    for name in ("train/loss", "grad_norm", "val/loss"):
        value = metrics.get(name)
        if value is not None and not math.isfinite(value):
            raise NonFiniteError(
                f"{name} is {value} in epoch {metrics['epoch']}",
                mend="lower lr, or set clip_norm=1; if epoch 1 has it already, look for NaN in the data",
            )


def tell(hooks: Sequence[Any], event: str, *args: Any) -> None:
    """Call each hook that has a method for the event."""
    for hook in hooks:
        method = getattr(hook, event, None)
        if method is not None:
            method(*args)

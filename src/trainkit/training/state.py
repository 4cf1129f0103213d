"""The state of a training: its settings, its objects and its progress."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.core.device import autocast
from trainkit.core.errors import Stopped
from trainkit.core.pytree import copy_to_cpu
from trainkit.data.loaders import Loader
from trainkit.optim.chained import ChainedOptimizer
from trainkit.optim.optimizer_state import check_same_names, optimizer_state, restore_optimizer, restore_scheduler
from trainkit.optim.schedulers import Scheduler
from trainkit.training.carried import carrying_modules, check_carried, match_saved_buffers
from trainkit.training.custom_step import CustomStep, steps_with_state
from trainkit.training.length import Length
from trainkit.training.losses import is_sum, whole_batch_module
from trainkit.training.metric_set import MetricSet
from trainkit.training.metrics import Mean, Metrics
from trainkit.training.progress import Progress


@dataclass(frozen=True)
class LoopSettings:
    """The settings of the loop, constant during a training. A checkpoint does not hold them: the config does."""

    epochs: int | None  # None: steps or max_minutes decide
    steps: int | None = None  # optimizer updates of the whole training
    max_minutes: float | None = None
    precision: str = "fp32"  # fp32, tf32, bf16 or fp16
    micro_batch: int | None = None  # maximum samples of one forward pass
    ema: float | None = None  # decay of the moving average
    on_oom: str = "stop"  # stop, split, or auto: split unless a layer takes batch statistics
    on_nonfinite: str = "stop"  # stop, skip (the batch), or rollback (to older weights)
    clip_norm: float | None = None
    clip_value: float | None = None
    monitor: str = "val/loss"  # the metric that decides the best epoch
    mode: str = "min"  # min or max
    patience: int | None = None  # epochs without a new best before an early stop
    min_delta: float = 0.0  # smallest improvement that counts for patience
    classes: int | None = None  # number of classes in the data; None: unknown
    # Check the loss and gradient of each step before the update. On an accelerator the check synchronizes the
    # device, so the default (None) checks there only if `on_nonfinite` needs it.
    check_steps: bool | None = None


@dataclass
class Objects:
    """The objects that the config built and that a step changes."""

    model: nn.Module
    loss_fn: nn.Module
    optimizer: Optimizer | ChainedOptimizer
    device: torch.device
    trained: nn.ModuleDict  # model and loss
    autocast: AbstractContextManager[Any]  # of a forward pass and its loss
    step_schedulers: list[Scheduler] = field(default_factory=list)
    epoch_schedulers: list[Scheduler] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None  # for fp16, whose small gradients would underflow to 0
    ema: AveragedModel | None = None  # the moving average of `trained`
    watch: dict[str, nn.Parameter] = field(default_factory=dict)  # parameters that are logged each epoch
    joining: dict[int, list[nn.Parameter]] = field(default_factory=dict)  # epochs -> parameters frozen until then
    needs_closure: bool = False  # the optimizer evaluates the loss itself, as LBFGS does
    tracks_statistics: bool = False  # a layer takes batch statistics
    statistics: list[Tensor] = field(default_factory=list)  # batch statistics to undo if a step is repeated
    carrying: list[nn.Module] = field(default_factory=list)  # modules that carry state from batch to batch
    train_metrics: MetricSet = field(default_factory=lambda: MetricSet("train", {}, torch.device("cpu")))
    val_metrics: MetricSet = field(default_factory=lambda: MetricSet("val", {}, torch.device("cpu")))
    hooks: dict[str, Any] = field(default_factory=dict)  # custom hooks that have a state
    training_step: CustomStep | None = None  # None: the supervised step
    evaluation_step: CustomStep | None = None
    stream: Any = None  # the loader of a stream, whose position is saved

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Each optimizer by its name under `optim`; a single optimizer is called `optim`."""
        if isinstance(self.optimizer, ChainedOptimizer):
            return self.optimizer.optimizers
        return {"optim": self.optimizer}

    @property
    def schedulers(self) -> list[Scheduler]:
        """All schedulers: first those that step after each batch, then those that step after each epoch."""
        return [*self.step_schedulers, *self.epoch_schedulers]

    @property
    def parameters(self) -> Iterator[Tensor]:
        """Every parameter that the optimizer updates."""
        return (param for group in self.optimizer.param_groups for param in group["params"])

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The model and the loss that are validated: their moving averages if there is an `ema`."""
        modules: Any = self.trained if self.ema is None else self.ema.module
        return modules["model"], modules["loss"]

    @property
    def steps_with_state(self) -> dict[str, Any]:
        """The objects of custom steps that have a state, by their config keys."""
        return steps_with_state(self.training_step, self.evaluation_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the objects for a checkpoint; the tensors are not copies."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss_fn.state_dict(),
            "optimizers": {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()},
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "train_metrics": self.train_metrics.state_dict(),
            "steps": {key: step.state_dict() for key, step in self.steps_with_state.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, keep_rates: bool = False) -> None:
        """Restore what `state_dict` returned.

        Args:
            saved: the state.
            keep_rates: keep the schedulers, the learning rates and the other options of optimizers as they are.

        Raises:
            ValueError: the state belongs to other objects.
        """
        check_same_names(self.optimizers, saved["optimizers"], "optimizers")
        if (self.ema is None) != (saved["ema"] is None):
            raise ValueError(f"ema: {_is_on(saved['ema'])} in the checkpoint, {_is_on(self.ema)} here")
        if not keep_rates and len(self.schedulers) != len(saved["schedulers"]):
            raise ValueError(f"schedulers: {len(saved['schedulers'])} in the checkpoint, {len(self.schedulers)} here")
        check_same_names(self.steps_with_state, saved.get("steps", {}), "custom steps with a state")
        match_saved_buffers(self.model, saved["model"])
        self.model.load_state_dict(saved["model"])
        self.loss_fn.load_state_dict(saved["loss"])
        if self.ema is not None:
            match_saved_buffers(self.ema, saved["ema"])
            self.ema.load_state_dict(saved["ema"])
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])
        for name, optimizer in self.optimizers.items():
            content = copy_to_cpu(saved["optimizers"][name])  # optimizers keep the tensors that they load
            restore_optimizer(optimizer, content, with_options=not keep_rates)
        for key, step in self.steps_with_state.items():
            step.load_state_dict(copy_to_cpu(saved["steps"][key]))
        if not keep_rates:
            for scheduler, content in zip(self.schedulers, saved["schedulers"], strict=True):
                restore_scheduler(scheduler, content)


def _is_on(value: Any) -> str:
    return "off" if value is None else "on"


class Phase(enum.Enum):
    """What the loop is doing. It decides when a signal may stop the training and when a step may be repeated."""

    IDLE = "between two phases"
    WAITING = "for a batch"
    STEPPING = "a step whose weights are unchanged so far"
    UPDATING = "a step whose weights may have changed"
    EVALUATING = "a validation"

    @property
    def interruptible(self) -> bool:
        """Whether a signal may stop the training at once."""
        return self in (Phase.WAITING, Phase.EVALUATING)


@dataclass
class State(Length):
    """The state of a training, which hooks receive.

    Hooks may read and set each field of a part by its short name: `state.grad_norm` is `state.progress.grad_norm`,
    and `state.clip_norm = 1.0` sets `state.settings.clip_norm`. trainkit itself names the part.
    """

    settings: LoopSettings
    objects: Objects
    progress: Progress
    phase: Phase = Phase.IDLE
    stop: Stopped | None = None  # the signal that asked for a stop
    directory: Path | None = None  # of the run; None: the training has no run directory
    loaders: dict[str, Loader] = field(default_factory=dict)  # of the data: train, and val if there is validation data

    @property
    def custom_step(self) -> CustomStep | None:
        """The custom step of the present phase; None: the supervised step."""
        is_evaluation = self.phase is Phase.EVALUATING
        return self.objects.evaluation_step if is_evaluation else self.objects.training_step

    def begin_epoch(self) -> None:
        """Reset the counts of the epoch."""
        progress = self.progress
        progress.earlier_seconds += progress.elapsed
        progress.loss, progress.means = new_loss_mean(self.objects), {}
        progress.batch = progress.seen = progress.tokens = progress.skipped = 0
        progress.seconds, progress.began = 0.0, None
        self.objects.train_metrics.reset()

    def set_frozen(self) -> None:
        """Freeze the parameters that join later, and unfreeze those that have joined.

        An optimizer skips parameters without a gradient, so its state of a parameter starts when it joins.
        """
        for epochs, params in self.objects.joining.items():
            for param in params:
                param.requires_grad_(self.progress.epoch >= epochs)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.objects.model

    @property
    def loss_fn(self) -> nn.Module:
        """The loss."""
        return self.objects.loss_fn

    @property
    def optimizer(self) -> Optimizer | ChainedOptimizer:
        """The optimizer."""
        return self.objects.optimizer

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.objects.device

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The model and the loss that are validated."""
        return self.objects.evaluated

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.progress.epoch

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.progress.step

    @property
    def batch(self) -> int:
        """Batches of this epoch done."""
        return self.progress.batch

    @property
    def batches(self) -> int:
        """Batches of a whole epoch."""
        return self.progress.batches

    @property
    def loss(self) -> Mean:
        """The running mean loss of this epoch."""
        return self.progress.loss

    @property
    def best(self) -> Metrics | None:
        """The metrics of the best epoch so far."""
        return self.progress.best

    if not TYPE_CHECKING:  # hidden from type checkers, which would accept misspelt names

        def __getattr__(self, name: str) -> Any:
            part = None if name.startswith("_") or name in PART_NAMES else self._part_of(name)
            if part is None:
                raise AttributeError(f"the state of a training has no {name!r}; see docs/extending.md")
            return getattr(part, name)

        def __setattr__(self, name: str, value: Any) -> None:
            part = None if name in PART_NAMES else self._part_of(name)
            if name in PART_NAMES:
                object.__setattr__(self, name, value)
            elif part is self.settings:
                self.settings = replace(self.settings, **{name: value})
            elif part is not None:
                setattr(part, name, value)
            else:
                raise AttributeError(f"the state of a training has no {name!r} to set; see docs/extending.md")

    def _part_of(self, name: str) -> Progress | Objects | LoopSettings | None:
        """Return the part with a field or property of this name."""
        return next((part for part in (self.progress, self.objects, self.settings) if hasattr(part, name)), None)


PART_NAMES = frozenset(field.name for field in fields(State))


def new_state(
    model: nn.Module,
    loss_fn: nn.Module,
    optimizer: Optimizer | ChainedOptimizer,
    device: torch.device,
    settings: LoopSettings,
    *,
    step_schedulers: Sequence[Scheduler] = (),
    epoch_schedulers: Sequence[Scheduler] = (),
    watch: Mapping[str, nn.Parameter] | None = None,
    training_step: CustomStep | None = None,
    evaluation_step: CustomStep | None = None,
) -> State:
    """Return the state of a new training.

    Raises:
        ConfigError: the device does not support the precision, or checkpoints would not hold the carried state.
    """
    trained = nn.ModuleDict({"model": model, "loss": loss_fn})
    layers = [module for module in model.modules() if takes_batch_statistics(module)]
    carrying = carrying_modules(model)
    check_carried(carrying)
    if whole_batch_module(model, loss_fn) is not None:
        settings = replace(settings, on_oom="stop")
    if settings.on_oom == "auto":
        settings = replace(settings, on_oom="stop" if layers else "split")
    if settings.check_steps is None:
        settings = replace(settings, check_steps=device.type == "cpu" or settings.on_nonfinite != "stop")
    repeats_steps = settings.on_oom == "split" or settings.on_nonfinite != "stop"
    averaging = None if settings.ema is None else get_ema_multi_avg_fn(settings.ema)
    objects = Objects(
        model=model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        device=device,
        trained=trained,
        autocast=autocast(settings.precision, device),
        step_schedulers=list(step_schedulers),
        epoch_schedulers=list(epoch_schedulers),
        scaler=torch.amp.GradScaler(device.type) if settings.precision == "fp16" else None,
        ema=None if averaging is None else AveragedModel(trained, multi_avg_fn=averaging),
        watch=dict(watch or {}),
        needs_closure=needs_closure(type(optimizer)),
        tracks_statistics=bool(layers),
        statistics=[tensor for layer in layers for tensor in layer.buffers(recurse=False)] if repeats_steps else [],
        carrying=carrying,
        training_step=training_step,
        evaluation_step=evaluation_step,
    )
    return State(settings, objects, Progress(new_loss_mean(objects), micro_batch=settings.micro_batch))


def new_loss_mean(objects: Objects) -> Mean:
    """Return an empty mean of the loss."""
    return Mean(objects.device, summed=objects.training_step is None and is_sum(objects.loss_fn))


def needs_closure(optimizer: type[Optimizer | ChainedOptimizer]) -> bool:
    """Return whether optimizers of this class evaluate the loss themselves, as LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def takes_batch_statistics(module: nn.Module) -> bool:
    """Return whether a layer normalizes by batch statistics or tracks them."""
    tracks = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return tracks or isinstance(module, nn.modules.batchnorm._BatchNorm)

"""The state of a training: its settings, its objects (`objects`) and its progress (`progress`)."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.core.device import autocast
from trainkit.core.errors import Stopped
from trainkit.data.loaders import Loader
from trainkit.optim.chained import ChainedOptimizer
from trainkit.optim.schedulers import Scheduler
from trainkit.training.carried import carrying_modules, check_carried
from trainkit.training.custom_step import CustomStep
from trainkit.training.length import Length
from trainkit.training.losses import whole_batch_module
from trainkit.training.metrics import Mean, Metrics
from trainkit.training.objects import Objects, needs_closure, new_loss_mean, takes_batch_statistics
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

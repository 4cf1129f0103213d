"""All that a training is, in one place."""

from __future__ import annotations

import inspect
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.core.device import autocast
from trainkit.core.errors import Stopped
from trainkit.optim.groups import ChainedOptimizer
from trainkit.optim.schedulers import Scheduler
from trainkit.training.losses import is_sum
from trainkit.training.metrics import Mean

Metrics = dict[str, Any]


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
    precision: str = "fp32"  # or tf32, bf16, fp16
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
    unreadable: dict[str, dict[int, str]] = field(default_factory=dict)  # samples left out of train and val, with why
    skipped: int = 0  # batches of this epoch left out, as their loss or gradient was not finite
    seconds: float = 0.0  # that this epoch took in earlier processes
    began: float | None = None  # when it began in this one
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
    autocast: AbstractContextManager[Any] = field(init=False)  # of a forward pass and its loss
    scaler: torch.amp.GradScaler | None = field(init=False, default=None)  # with fp16, whose small gradients would be 0
    needs_closure: bool = field(init=False)  # the optimizer evaluates the loss itself, as LBFGS does
    trained: nn.ModuleDict = field(init=False)  # model and loss
    ema: AveragedModel | None = None  # their moving average
    sees_batches: bool = False  # some layer takes batch statistics
    statistics: list[Tensor] = field(default_factory=list)  # of the batches seen, which a step taken again counts twice

    def __post_init__(self) -> None:
        self.begin_epoch()
        # To ask an accelerator is to wait for it, so that is done for those alone who asked for more than to stop.
        self.checks_steps = self.device.type == "cpu" or self.on_nonfinite != "stop"
        self.autocast = autocast(self.precision, self.device)
        if self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)
        self.needs_closure = needs_closure(type(self.optimizer))
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
    def optimizers(self) -> dict[str, Optimizer]:
        """Each optimizer by its name under `optim`; one alone is called optim itself."""
        several = isinstance(self.optimizer, ChainedOptimizer)
        return self.optimizer.optimizers if several else {"optim": self.optimizer}  # type: ignore[union-attr,dict-item]

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The model and the loss that are validated: with `ema`, their moving averages."""
        modules: Any = self.trained if self.ema is None else self.ema.module
        return modules["model"], modules["loss"]

    def begin_epoch(self) -> None:
        """Count from nothing."""
        self.loss = Mean(self.device, summed=is_sum(self.loss_fn))
        self.batch = self.seen = self.skipped = 0
        self.seconds, self.began = 0.0, None

    @property
    def elapsed(self) -> float:
        """The seconds that this epoch has taken so far."""
        return self.seconds + (0.0 if self.began is None else time.perf_counter() - self.began)

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.epochs or self.stopped_early


def needs_closure(optimizer: type[Optimizer | ChainedOptimizer]) -> bool:
    """Whether optimizers of a class evaluate the loss themselves, as LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def takes_batch_statistics(module: nn.Module) -> bool:
    """Whether a layer normalises by its batch, or keeps count of the batches it sees."""
    kept = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return kept or isinstance(module, nn.modules.batchnorm._BatchNorm)

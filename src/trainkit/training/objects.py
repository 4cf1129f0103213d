"""The objects of a training that a step changes: model, loss, optimizers, schedulers and so on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from trainkit.core.pytree import copy_to_cpu
from trainkit.core.ranks import ALONE, Ranks
from trainkit.core.shards import shard_state_dict
from trainkit.optim.chained import ChainedOptimizer
from trainkit.optim.optimizer_state import check_same_names, optimizer_state, restore_optimizer, restore_scheduler
from trainkit.optim.schedulers import Scheduler
from trainkit.training.carried import match_saved_buffers
from trainkit.training.custom_step import CustomStep, steps_with_state
from trainkit.training.losses import is_sum
from trainkit.training.metric_set import MetricSet
from trainkit.training.metrics import Mean


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
    ranks: Ranks = ALONE  # the processes that train together
    synced: str | None = None  # the first batch norm layer that uses the statistics of all ranks
    may_overlap: bool = False  # gradients may be summed over the ranks during the backward pass
    overlapped: nn.Module | None = None  # the model, if its backward pass does it
    sharded: bool = False  # each rank holds a part of every parameter of the model

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
        return parameters_of(self.optimizer)

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The model and the loss that are validated: their moving averages if there is an `ema`."""
        modules: Any = self.trained if self.ema is None else self.ema.module
        return modules["model"], modules["loss"]

    def true_everywhere(self, found: bool) -> bool:
        """Return whether something is true of the shards of every rank. Without shards, this rank decides alone."""
        return all(row[0] for row in self.ranks.agree(found)) if self.sharded else found

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
        self._check_ema(saved)
        if not keep_rates and len(self.schedulers) != len(saved["schedulers"]):
            raise ValueError(f"schedulers: {len(saved['schedulers'])} in the checkpoint, {len(self.schedulers)} here")
        check_same_names(self.steps_with_state, saved.get("steps", {}), "custom steps with a state")
        self.load_modules(saved)
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

    def load_modules(self, saved: Mapping[str, Any]) -> None:
        """Restore the model, the loss and their moving averages from what `state_dict` returned.

        Raises:
            ValueError: only one of the saved state and this training has an `ema`.
        """
        self._check_ema(saved)
        match_saved_buffers(self.model, saved["model"])
        self.model.load_state_dict(shard_state_dict(saved["model"], self.model.state_dict()))
        self.loss_fn.load_state_dict(saved["loss"])
        if self.ema is not None:
            match_saved_buffers(self.ema, saved["ema"])
            self.ema.load_state_dict(shard_state_dict(saved["ema"], self.ema.state_dict()))

    def _check_ema(self, saved: Mapping[str, Any]) -> None:
        if (self.ema is None) != (saved["ema"] is None):
            raise ValueError(f"ema: {_is_on(saved['ema'])} in the checkpoint, {_is_on(self.ema)} here")


def _is_on(value: Any) -> str:
    return "off" if value is None else "on"


def parameters_of(optimizer: Optimizer | ChainedOptimizer) -> Iterator[Tensor]:
    """Return every parameter that an optimizer updates."""
    return (param for group in optimizer.param_groups for param in group["params"])


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

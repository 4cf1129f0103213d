"""Build a session: every object that the settings of a training name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.build.activation_checkpointing import apply_activation_checkpointing
from trainkit.build.data import build_loaders
from trainkit.build.hooks import build_hook
from trainkit.build.loggers import build_logger
from trainkit.build.metrics import build_metrics, choose_mode
from trainkit.build.modules import Initialize, build_modules, memory_errors, prepare_process
from trainkit.build.optim import build_optimizers, build_schedulers
from trainkit.build.shared_batches import check_shared_batches
from trainkit.build.steps import build_steps
from trainkit.config.metrics import parts_of
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, Problem, TrainkitError, UserCodeError
from trainkit.core.ranks import ALONE, Ranks
from trainkit.core.rng import seed_all
from trainkit.core.spelling import did_you_mean
from trainkit.data import cache
from trainkit.data.loaders import Loader
from trainkit.data.stream_loader import StreamLoader
from trainkit.losses import REGRESSION_LOSSES
from trainkit.optim.chained import ChainedOptimizer
from trainkit.optim.group_table import param_table
from trainkit.optim.groups import Group
from trainkit.optim.params import named_params
from trainkit.training.compile import compile_model
from trainkit.training.custom_step import CustomStep
from trainkit.training.losses import whole_batch_module
from trainkit.training.overlap import why_not_overlapped
from trainkit.training.state import LoopSettings, State, new_state
from trainkit.training.sync_batchnorm import is_synced, sync_batchnorm
from trainkit.training.whole_batch import declared_error


@dataclass
class Session:
    """The objects of a training, and the settings they were built from.

    Attributes:
        settings: including the values that depend on the data.
        params: the rows of `optim.param_table`.
        held_out: whether the validation samples were split off the training data.
        notes: what was decided for settings such as `auto`.
    """

    settings: Settings
    state: State
    train: Loader
    val: Loader | None
    hooks: dict[str, Any]
    loggers: dict[str, Any]
    groups: list[Group]
    params: list[dict[str, Any]]
    named: dict[str, nn.Parameter]
    held_out: bool
    notes: list[str]

    def close(self) -> None:
        """End the processes that read data, because the Python process waits for them at exit."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def build_session(
    settings: Settings,
    on_progress: cache.OnProgress | None = None,
    initialize: Initialize | None = None,
    ranks: Ranks = ALONE,
) -> Session:
    """Build everything that the settings name.

    The data is built first, because the model needs the number of classes and the shape of a sample.

    Args:
        settings: the settings of the training.
        on_progress: called with the progress while samples are read into memory. Without it, no samples
            are read into memory.
        initialize: is called with the new model, to load weights into it.
        ranks: the processes that train together.

    Raises:
        ConfigError: wrong arguments, param groups or values.
        DataError: a data set cannot be read.
        OutOfMemoryError: there is too little memory for an object.
        UserCodeError: code that a `_target_` names raised another error.
    """
    with memory_errors():
        return _build_session(settings, on_progress, initialize, ranks)


def _build_session(
    settings: Settings, on_progress: cache.OnProgress | None, initialize: Initialize | None, ranks: Ranks
) -> Session:
    problems = settings.find_wrong_targets()
    if problems:
        raise ConfigError(*problems)
    device = prepare_process(settings, ranks)
    settings, data = build_loaders(settings, device, on_progress, ranks)
    train, val = data.train, data.val if settings.evaluation_step is not None else None

    # Seed again: the model must not depend on the random numbers that the data used.
    seed_all(settings.seed, deterministic=bool(settings.deterministic))
    metrics = build_metrics(settings, device)
    settings = settings.with_mode(choose_mode(settings, metrics))
    loaders = [loader for loader in (train, val) if loader is not None]
    model, loss_fn, module_notes = build_modules(settings, device, loaders, initialize)
    if ranks.are_several and settings.sync_batchnorm:
        sync_batchnorm(model, ranks, compiled=bool(settings.compile))
    named = named_params(model, loss_fn)
    problems = unknown_watched_params(settings.watch, [param.name for param in named])
    try:
        optimizers, groups, options = build_optimizers(settings, named)
    except ConfigError as error:
        raise ConfigError(*error.problems, *problems) from error
    if problems:
        raise ConfigError(*problems)
    table = param_table(named, groups, options)  # before schedulers change the learning rates
    steps = build_steps(settings, device)
    state = build_state(settings, device, model, loss_fn, optimizers, val, steps)
    state.objects.ranks = ranks
    state.objects.synced = next((name for name, module in model.named_modules() if is_synced(module)), None)
    state.objects.train_metrics, state.objects.val_metrics = metrics["train"], metrics["val"]
    check_shared_batches(settings, state, train)
    _freeze_until_joined(state, groups)
    state.objects.watch = {param.name: param.tensor for param in named if param.name in settings.watch}
    state.progress.batches, state.progress.samples = len(train), train.samples
    state.objects.stream = train if isinstance(train, StreamLoader) else None
    state.progress.unreadable = {"train": train.unreadable} | ({"val": val.unreadable} if val is not None else {})
    overlap_note = _overlap_note(settings, state)
    blocks_note = apply_activation_checkpointing(settings, model)
    if settings.compile:  # last: the averaged model must stay uncompiled
        compile_model(model, "default" if settings.compile is True else settings.compile)
    hooks = {name: build_hook(name, node) for name, node in settings.hooks.items()}
    state.objects.hooks = {name: hook for name, hook in hooks.items() if hasattr(hook, "state_dict")}
    loggers = {name: build_logger(name, node) for name, node in settings.logger.items()}
    notes = [*data.notes, *module_notes, *filter(None, [blocks_note, overlap_note]), *_notes(settings, device, val)]
    params = {p.name: p.tensor for p in named}
    return Session(settings, state, train, val, hooks, loggers, groups, table, params, data.held_out, notes)


def _overlap_note(settings: Settings, state: State) -> str | None:
    """Let the backward pass sum gradients if `distributed` is ddp; return a note if it cannot."""
    if settings.distributed != "ddp" or not state.objects.ranks.are_several:
        return None
    reason = why_not_overlapped(state)
    reason = reason or ("compiled code is not divided" if settings.compile else "")
    reason = reason or ("on_oom=split repeats steps" if settings.on_oom == "split" else "")
    state.objects.may_overlap = not reason
    return f"note: distributed=ddp: gradients are summed after the backward pass, because {reason}" if reason else None


def _freeze_until_joined(state: State, groups: list[Group]) -> None:
    """Freeze the parameters of the groups that join the training after some epochs."""
    for group in groups:
        if group.frozen_epochs:
            tensors = [param.tensor for param in group.params]
            state.objects.joining.setdefault(group.frozen_epochs, []).extend(tensors)
    state.set_frozen()


def _notes(settings: Settings, device: torch.device, val: Loader | None) -> list[str]:
    notes = [f"precision={settings.precision}"] if settings.precision != "fp32" else []
    notes += ["the first step compiles the model, which takes a while"] if settings.compile else []
    if settings.precision == "fp16" and device.type == "cpu":
        notes.append("note: few CPUs compute in fp16; bf16 is faster on most CPUs")
    unused = [name for name, node in settings.metrics.items() if "val" in parts_of(node)] if val is None else []
    if unused:
        notes.append(f"note: there is no validation set, so there is no val/{', val/'.join(unused)}")
    return notes


def build_state(
    settings: Settings,
    device: torch.device,
    model: nn.Module,
    loss_fn: nn.Module,
    optimizers: dict[str, Optimizer],
    val: Loader | None,
    steps: tuple[CustomStep | None, CustomStep | None] = (None, None),
) -> State:
    """Build the schedulers and the state of a training. With `ema`, the state copies the model.

    Raises:
        ConfigError: settings that contradict each other.
        UserCodeError: the model cannot be copied, or another part raised an error.
    """
    step_schedulers, epoch_schedulers = build_schedulers(settings, optimizers)
    optimizer = ChainedOptimizer(optimizers) if len(optimizers) > 1 else next(iter(optimizers.values()))
    loop_settings = LoopSettings(
        epochs=settings.epochs,
        steps=settings.steps,
        max_minutes=settings.max_minutes,
        precision=settings.precision,
        micro_batch=settings.micro_batch,
        ema=settings.ema,
        on_oom=settings.on_oom,
        on_nonfinite=settings.on_nonfinite,
        clip_norm=settings.clip_norm,
        clip_value=settings.clip_value,
        monitor=choose_monitor(settings, loss_fn, val),
        mode=settings.monitor.mode,
        patience=settings.early_stop.patience if settings.early_stop else None,
        min_delta=settings.early_stop.min_delta if settings.early_stop else 0.0,
        classes=settings.data.classes,
    )
    try:
        state = new_state(
            model,
            loss_fn,
            optimizer,
            device,
            loop_settings,
            step_schedulers=step_schedulers,
            epoch_schedulers=epoch_schedulers,
            training_step=steps[0],
            evaluation_step=steps[1],
        )
    except TrainkitError:
        raise
    except Exception as error:
        raise UserCodeError("ema" if settings.ema else "training", error) from error
    if steps[0] is not None and steps[0].is_generator and state.objects.needs_closure:
        cause = f"training_step: it yields a loss for each optimizer, and {type(optimizer).__name__} evaluates the loss"
        raise ConfigError(cause, hint="choose another optim")
    whole_batch = whole_batch_module(model, loss_fn)
    if whole_batch is not None and settings.micro_batch is not None and settings.micro_batch < settings.batch_size:
        raise declared_error(whole_batch, settings.micro_batch)
    if state.objects.scaler is not None and state.objects.needs_closure:
        cause = f"precision=fp16: {type(optimizer).__name__} evaluates the loss itself, so gradients cannot be scaled"
        raise ConfigError(cause, hint="write precision=bf16")
    return state


def choose_monitor(settings: Settings, loss_fn: nn.Module, val: Loader | None) -> str:
    """Return the metric that decides the best epoch: the training loss if there is no validation set.

    Raises:
        ConfigError: the training does not compute the metric.
    """
    metric = settings.monitor.metric
    own = [name for name, node in settings.metrics.items() if "val" in parts_of(node)]
    hint = "write data.split=0.2"
    if settings.evaluation_step is None:
        hint = "remove evaluation_step=off, or write monitor.metric=train/loss monitor.mode=min"
    if val is None and metric.removeprefix("val/").partition("/")[0] in own:
        raise ConfigError(f"monitor.metric={metric}: there is no validation set", hint=hint)
    if metric == "val/accuracy" and "accuracy" not in own and isinstance(loss_fn, REGRESSION_LOSSES):
        raise ConfigError(
            f"monitor.metric={metric}: accuracy needs classes, which {type(loss_fn).__name__} does not have",
            hint="write monitor.metric=val/loss monitor.mode=min",
        )
    if val is None and metric == "val/accuracy":
        raise ConfigError(f"monitor.metric={metric}: there is no validation set", hint=hint)
    return "train/loss" if val is None and metric == "val/loss" else metric


def unknown_watched_params(watch: Sequence[str], params: list[str]) -> list[Problem]:
    """Return the names in `watch` that are not parameters of the model or the loss."""
    return [
        Problem(f"watch: the model has no parameter {name!r}", did_you_mean(name, params))
        for name in watch
        if name not in params
    ]

"""The only place where config becomes objects: model, loss, optimizer, scheduler, data, hooks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from trainkit.build.data import loaders
from trainkit.build.instantiate import call_target
from trainkit.build.model import apply_memory_format, build_loss, build_model
from trainkit.build.optim import build_optimizers, build_schedulers
from trainkit.config.targets import check_targets, locate
from trainkit.core import device
from trainkit.core.errors import ConfigError, Problem, TrainkitError, UserCodeError
from trainkit.core.rng import seed_all
from trainkit.core.spelling import did_you_mean
from trainkit.data import cache
from trainkit.data.loaders import Loader
from trainkit.optim import groups as optim
from trainkit.optim.chained import ChainedOptimizer
from trainkit.optim.params import named_params
from trainkit.training.compile import compile_model, defer_dynamo
from trainkit.training.hooks import EVENTS
from trainkit.training.state import LoopSettings, State, needs_closure, new_state


@dataclass
class Session:
    """All that a config builds."""

    state: State
    train: Loader
    val: Loader | None
    hooks: dict[str, Any]
    groups: list[optim.Group]
    params: list[dict[str, Any]]  # the table of `optim.param_table`
    named: dict[str, nn.Parameter]
    split_off: bool  # the validation set, from the training set
    config: DictConfig  # that knows what the data tells
    notes: list[str]  # what was decided that the config left open

    def close(self) -> None:
        """End the processes that read data; the process would wait for them as it exits."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def build_session(config: DictConfig, on_progress: cache.OnProgress | None = None) -> Session:
    """Build everything a checked config names: data first, for what it tells of classes and shapes.

    Args:
        config: checked.
        on_progress: is called while samples are read into memory, with how far that is; without, none are.

    Raises:
        ConfigError: arguments, groups or values that do not fit what they are for.
        DataError: a data set cannot be read.
        UserCodeError: something that a `_target_` names raised an error.
    """
    problems = check_targets(OmegaConf.to_container(config, resolve=True))
    if problems:
        raise ConfigError(*problems)
    defer_dynamo()
    where = device.select_device(config.device)
    seed_all(config.seed, deterministic=bool(config.deterministic))  # for data made at random
    if where.type == "cpu":
        device.disable_malloc_trim()
    config, data = loaders(config, where, on_progress)
    train, val = data.train, data.val

    seed_all(config.seed, deterministic=bool(config.deterministic))
    model = build_model(config.model, train, where)
    loss_fn = build_loss(config.loss).to(where)
    asked, why = choose_memory_format(config, where)
    laid_out = (
        apply_memory_format(model, loss_fn, asked, [loader for loader in (train, val) if loader is not None], where)
        or why
    )
    named = named_params(model, loss_fn)
    problems = watch_problems(config.watch, [param.name for param in named])
    try:
        optimizers, groups, options = build_optimizers(config, named)
    except ConfigError as error:
        raise ConfigError(*error.problems, *problems) from error
    if problems:
        raise ConfigError(*problems)
    table = optim.param_table(named, groups, options)  # before a scheduler changes any rate
    state = assemble(config, where, model, loss_fn, optimizers, val)
    state.objects.watch = {param.name: param.tensor for param in named if param.name in config.watch}
    state.progress.batches, state.progress.samples = len(train), train.samples
    state.progress.unreadable = {"train": train.unreadable} | ({"val": val.unreadable} if val is not None else {})
    if config.compile:  # the parameters keep their names, and an average its own copy
        compile_model(model, "default" if config.compile is True else config.compile)
    hooks = {str(name): build_hook(name, node) for name, node in config.hooks.items()}
    notes = [*data.notes, *([laid_out] if laid_out else [])]
    notes += [f"precision={config.precision}"] if config.precision != "fp32" else []
    notes += ["compiled as the first step begins, which takes a while"] if config.compile else []
    if config.precision == "fp16" and where.type == "cpu":
        notes.append("note: few processors compute in fp16; bf16 is faster on most")
    params = {p.name: p.tensor for p in named}
    return Session(state, train, val, hooks, groups, table, params, data.split_off, config, notes)


def assemble(
    config: DictConfig,
    where: torch.device,
    model: nn.Module,
    loss_fn: nn.Module,
    optimizers: dict[str, Optimizer],
    val: Loader | None,
) -> State:
    """The state of a training out of its parts and the keys of the config; with `ema` it copies the model."""
    step_schedulers, epoch_schedulers = build_schedulers(config, optimizers)
    early_stop = config.early_stop or {"patience": None, "min_delta": 0.0}
    optimizer = ChainedOptimizer(optimizers) if len(optimizers) > 1 else next(iter(optimizers.values()))
    monitor = monitored(config, loss_fn, val)
    try:
        settings = LoopSettings(
            epochs=config.epochs,
            precision=config.precision,
            micro_batch=config.micro_batch,
            ema=config.ema,
            on_oom=config.on_oom,
            on_nonfinite=config.on_nonfinite,
            clip_norm=config.clip_norm,
            clip_value=config.clip_value,
            monitor=monitor,
            mode=config.monitor.mode,
            patience=early_stop["patience"],
            min_delta=early_stop["min_delta"],
        )
        state = new_state(
            model,
            loss_fn,
            optimizer,
            where,
            settings,
            step_schedulers=step_schedulers,
            epoch_schedulers=epoch_schedulers,
        )
    except TrainkitError:
        raise
    except Exception as error:
        raise UserCodeError("ema" if config.ema else "training", error) from error
    if state.objects.scaler is not None and state.objects.needs_closure:
        cause = f"precision=fp16: {type(optimizer).__name__} evaluates the loss itself, which no scaler bears"
        raise ConfigError(cause, hint="write precision=bf16")
    return state


def choose_memory_format(config: DictConfig, where: torch.device) -> tuple[str, str | None]:
    """The `memory_format`; why not channels last.

    On an accelerator, where weights and gradients are laid out like images, auto takes them only for optimizers
    of torch that do not flatten gradients, as LBFGS does.
    """
    if where.type == "cpu":
        return str(config.memory_format), None
    node = config.optim
    makers = [locate(one["_target_"]) for one in ([node] if "_target_" in node else node.values())]
    made = [maker for maker in makers if inspect.isclass(maker) and issubclass(maker, Optimizer)]
    flattening = [maker for maker in made if needs_closure(maker)]
    if flattening and config.memory_format == "channels_last":
        cause = f"memory_format=channels_last: {flattening[0].__name__} takes no such gradients"
        raise ConfigError(cause, hint="write memory_format=auto")
    own = [maker for maker in makers if maker not in made or not maker.__module__.startswith("torch.optim.")]
    if config.memory_format != "auto" or not (flattening or own):
        return str(config.memory_format), None
    name = getattr((flattening or own)[0], "__name__", "the optimizer")
    why = f"images contiguous: {name} may need it; if not, write memory_format=channels_last"
    return "contiguous", None if flattening else why


# --------------------------------------------------------------------------------------- what is seen


def monitored(config: DictConfig, loss_fn: nn.Module, val: Loader | None) -> str:
    """The metric that decides the best epoch: the training loss where nothing is validated."""
    metric = str(config.monitor.metric)
    if metric == "val/accuracy" and isinstance(loss_fn, nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss):
        raise ConfigError(
            f"monitor.metric={metric}: a {type(loss_fn).__name__} has no classes to be right about",
            hint="write monitor.metric=val/loss monitor.mode=min",
        )
    if val is None and metric.startswith("val/"):
        if metric != "val/loss":
            raise ConfigError(f"monitor.metric={metric}: nothing is validated", hint="write data.split=0.2")
        return "train/loss"
    return metric


def watch_problems(names: Any, there: list[str]) -> list[Problem]:
    """The names in `watch` that are no parameters of the model or the loss."""
    return [
        Problem(f"watch: the model has no parameter {name!r}", did_you_mean(name, there))
        for name in names
        if name not in there
    ]


def build_hook(name: Any, node: DictConfig) -> Any:
    """A hook of the user's, which must have a method that the loop calls, and none misspelt."""
    hook = call_target(node, f"hooks.{name}")
    methods = [method for method in dir(hook) if method.startswith("on_")]
    unknown = [method for method in methods if method not in EVENTS]
    if unknown or not methods:
        words = f"no method {unknown[0]} is ever called" if unknown else "it has no method that is called"
        hint = did_you_mean(unknown[0], EVENTS) if unknown else f"give it one of {', '.join(EVENTS)}"
        raise ConfigError(f"hooks.{name}: {words}", hint=hint)
    return hook

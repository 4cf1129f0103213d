"""The only place where config becomes objects: model, loss, optimizer, scheduler, data, hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from trainkit import device, optim
from trainkit.build_optim import build_optimizers, build_schedulers
from trainkit.counting import count_steps
from trainkit.errors import ConfigError, DataError, Problem, UserCodeError, did_you_mean
from trainkit.hooks import EVENTS
from trainkit.instantiate import call
from trainkit.loaders import Loader, Prepare, count_classes, make_loader, map_tensors, split
from trainkit.rules import named_params
from trainkit.state import State
from trainkit.targets import wrong_targets


@dataclass
class Training:
    """All that a config builds."""

    state: State
    train: Loader
    val: Loader | None
    hooks: dict[str, Any]
    groups: list[optim.Group]
    params: list[dict[str, Any]]  # the table of `optim.table`
    named: dict[str, nn.Parameter]
    split_off: bool  # the validation set, from the training set
    config: DictConfig  # that knows what the data tells


def training(config: DictConfig) -> Training:
    """Build everything a checked config names: data first, for what it tells of classes and shapes.

    Raises:
        ConfigError: arguments, groups or values that do not fit what they are for.
        DataError: a data set cannot be read.
        UserCodeError: something that a `_target_` names raised an error.
    """
    problems = wrong_targets(OmegaConf.to_container(config, resolve=True))
    if problems:
        raise ConfigError(*problems)
    where = device.pick(config.device)
    device.seed_all(config.seed, deterministic=bool(config.deterministic))  # for data made at random
    config, train, val, split_off = loaders(config, where)

    device.seed_all(config.seed, deterministic=bool(config.deterministic))
    model = build_model(config.model, train, where)
    loss_fn = build_loss(config.loss).to(where)
    named = named_params(model, loss_fn)
    problems = watch_problems(config.watch, [param.name for param in named])
    try:
        optimizers, groups, options = build_optimizers(config, named)
    except ConfigError as error:
        raise ConfigError(*error.problems, *problems) from error
    if problems:
        raise ConfigError(*problems)
    table = optim.table(named, groups, options)  # before a scheduler changes any rate
    step_schedulers, epoch_schedulers = build_schedulers(config, optimizers)
    several = len(optimizers) > 1
    early_stop = config.early_stop or {"patience": None, "min_delta": 0.0}
    state = new_state(
        model=model,
        loss_fn=loss_fn,
        optimizer=optim.ChainedOptimizer(optimizers) if several else next(iter(optimizers.values())),
        device=where,
        epochs=config.epochs,
        step_schedulers=step_schedulers,
        epoch_schedulers=epoch_schedulers,
        ema_decay=config.ema,
        micro_batch=config.micro_batch,
        on_oom=config.on_oom,
        on_nonfinite=config.on_nonfinite,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        monitor=monitored(config, loss_fn, val),
        mode=config.monitor.mode,
        patience=early_stop["patience"],
        min_delta=early_stop["min_delta"],
        watch={param.name: param.tensor for param in named if param.name in config.watch},
    )
    state.batches, state.samples = len(train), train.samples
    state.unreadable = {"train": train.unreadable} | ({"val": val.unreadable} if val is not None else {})
    hooks = {str(name): build_hook(name, node) for name, node in config.hooks.items()}
    return Training(state, train, val, hooks, groups, table, {p.name: p.tensor for p in named}, split_off, config)


# ----------------------------------------------------------------------------------------------- data


def loaders(config: DictConfig, where: torch.device) -> tuple[DictConfig, Loader, Loader | None, bool]:
    """A copy of the config that knows what the data tells: classes, steps; the loaders; whether one was split off."""
    train_set, val_set, classes, split_off = datasets(config)
    config = config.copy()
    if config.data.classes is None:
        config.data.classes = classes
        if classes is None and "data.classes" in OmegaConf.to_yaml(config.model):
            raise ConfigError(
                f"data.classes: {config.data.train['_target_']} does not say how many it has, and the model asks",
                mend="write data.classes=NUMBER, or give the data set an attribute `classes` or `targets`",
            )
    train = loader(config, train_set, where, train=True)
    val = None if val_set is None else loader(config, val_set, where, train=False)
    count_steps(config, len(train))
    return config, train, val, split_off


def datasets(config: DictConfig) -> tuple[Any, Any, int | None, bool]:
    """The training set; the validation set: named, else split off, else None; the number of classes.

    The last says whether the validation set was split off.
    """
    train = _dataset(config, "train")
    if train is None:
        raise DataError("data.train gave no data set", mend="choose another: data=digits")
    val = None if config.data.val is None else _dataset(config, "val")
    classes = count_classes(train)
    split_off = val is None and config.data.split is not None
    if split_off:
        train, val = split(train, config.data.split)
    for name, dataset in (("data.train", train), ("data.val", val)):
        if dataset is not None and len(dataset) == 0:
            raise DataError(f"{name} has no samples", mend="give it data, or change data.split")
    return train, val, classes, split_off


def _dataset(config: DictConfig, part: str) -> Any:
    node = config.data[part]
    try:
        dataset = call(node, f"data.{part}")
    except UserCodeError as error:
        if str(node["_target_"]).startswith("torchvision.") and not isinstance(error.error, TypeError):
            raise DataError(
                f"{node['_target_']} cannot read or fetch {node.get('root')}: " + " ".join(str(error.error).split()),
                mend="put them there by hand, choose another folder with data.root=FOLDER, "
                "or train on what needs no download: data=digits",
            ) from error
        if isinstance(error.error, OSError):
            error.exit_code = DataError.exit_code
        raise
    if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"data.{part}: {type(dataset).__name__} has no length or no items, so no epoch can be told",
            mend="give it __len__ and __getitem__, as torch.utils.data.Dataset has",
        )
    return dataset


def loader(config: DictConfig, dataset: Any, where: torch.device, *, train: bool) -> Loader:
    """The loader of a data set: the training set is shuffled by the seed."""
    normalize = config.data.normalize
    stats = [] if normalize is None else [torch.tensor(normalize[key], device=where) for key in ("mean", "std")]
    return make_loader(
        dataset,
        Prepare(where, *stats),
        batch_size=config.batch_size,
        seed=config.seed if train else None,
        num_workers=config.data.num_workers,
        limit_batches=config.limit_batches,
        skip=config.data.on_error == "skip",
    )


# ------------------------------------------------------------------------- model, loss and optimizer


def build_model(node: DictConfig, train: Loader | None, where: torch.device) -> nn.Module:
    """The model, on its device: one `_target_`, or named children applied in order.

    Lazy layers take their shapes from the first training batch; without data they stay lazy.
    """
    if "_target_" in node:
        model = call(node, "model")
    else:
        model = nn.Sequential()
        for name in map(str, node):
            model.add_module(name, _module(call(node[name], f"model.{name}"), f"model.{name}"))
    model = _module(model, "model").to(where)
    lazy = any(is_lazy(p) for p in model.parameters()) or any(isinstance(m, LazyModuleMixin) for m in model.modules())
    if train is not None and lazy:
        inputs, _ = next(train.batches(0))
        inputs = map_tensors(inputs, lambda tensor: tensor[:2])  # shapes are all that is wanted
        training, _ = model.training, model.eval()
        try:
            with torch.no_grad():
                model(inputs)
        except Exception as error:
            raise UserCodeError("model", error) from error
        model.train(training)
    return model


def _module(made: Any, path: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{path}: {type(made).__name__} is no torch.nn.Module", mend="name a module class")
    return made


def build_loss(node: DictConfig) -> nn.Module:
    """The loss; lists given for `weight` and `pos_weight` become tensors, as torch wants them."""
    tensors = {}
    for key in ("weight", "pos_weight"):
        value = list(node[key]) if OmegaConf.is_list(node.get(key)) else node.get(key)
        if isinstance(value, list | int | float):
            tensors[key] = torch.tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
    return _module(call(node, "loss", **tensors), "loss")


def new_state(**parts: Any) -> State:
    """The state of a training, with a copy of the model where `ema` asks for one."""
    try:
        return State(**parts)
    except Exception as error:
        raise UserCodeError("ema" if parts["ema_decay"] else "training", error) from error


# --------------------------------------------------------------------------------------- what is seen


def monitored(config: DictConfig, loss_fn: nn.Module, val: Loader | None) -> str:
    """The metric that decides the best epoch: the training loss where nothing is validated."""
    metric = str(config.monitor.metric)
    if metric == "val/accuracy" and isinstance(loss_fn, nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss):
        raise ConfigError(
            f"monitor.metric={metric}: a {type(loss_fn).__name__} has no classes to be right about",
            mend="write monitor.metric=val/loss monitor.mode=min",
        )
    if val is None and metric.startswith("val/"):
        if metric != "val/loss":
            raise ConfigError(f"monitor.metric={metric}: nothing is validated", mend="write data.split=0.2")
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
    hook = call(node, f"hooks.{name}")
    methods = [method for method in dir(hook) if method.startswith("on_")]
    unknown = [method for method in methods if method not in EVENTS]
    if unknown or not methods:
        words = f"no method {unknown[0]} is ever called" if unknown else "it has no method that is called"
        mend = did_you_mean(unknown[0], EVENTS) if unknown else f"give it one of {', '.join(EVENTS)}"
        raise ConfigError(f"hooks.{name}: {words}", mend=mend)
    return hook

"""The only place where config becomes objects: model, loss, optimizer, scheduler, data, hooks."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from trainkit import device, loop, optim
from trainkit.errors import ConfigError, DataError, Problem, TrainkitError, UserCodeError, did_you_mean
from trainkit.loaders import Loader, Prepare, count_classes, make_loader, map_tensors, split
from trainkit.loop import EVENTS, State
from trainkit.targets import locate, targets, wrong_arguments

GIVEN = {"optim": ("params",), "scheduler": ("optimizer",)}  # arguments that trainkit passes itself


@dataclass
class Training:
    """All that a config builds."""

    state: State
    train: Loader
    val: Loader | None
    hooks: dict[str, Any]
    groups: list[optim.Group]
    split_off: bool  # the validation set, from the training set


def training(config: DictConfig) -> Training:
    """Build everything a checked config names: data first, for what it tells of classes and shapes.

    Raises:
        ConfigError: arguments, groups or values that do not fit what they are for.
        DataError: a data set cannot be read.
        UserCodeError: something that a `_target_` names raised an error.
    """
    problems = target_problems(config)
    if problems:
        raise ConfigError(*problems)
    where = device.pick(config.device)
    device.seed_all(config.seed, deterministic=bool(config.deterministic))  # for data made at random
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

    device.seed_all(config.seed, deterministic=bool(config.deterministic))
    model = build_model(config.model, train, where)
    loss_fn = build_loss(config.loss).to(where)
    problems = watch_problems(config.watch, model)
    try:
        groups, optimizer = build_optimizer(config, model, loss_fn)
    except ConfigError as error:
        raise ConfigError(*error.problems, *problems) from error
    if problems:
        raise ConfigError(*problems)
    scheduler, interval = build_scheduler(config.scheduler, optimizer)
    early_stop = config.early_stop or {"patience": None, "min_delta": 0.0}
    state = State(
        model=model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        device=where,
        epochs=config.epochs,
        scheduler=scheduler,
        scheduler_interval=interval,
        micro_batch=config.micro_batch,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        monitor=monitored(config, loss_fn, val),
        mode=config.monitor.mode,
        patience=early_stop["patience"],
        min_delta=early_stop["min_delta"],
        watch=list(config.watch),
    )
    hooks = {str(name): build_hook(name, node) for name, node in config.hooks.items()}
    return Training(state, train, val, hooks, groups, split_off)


# ---------------------------------------------------------------------------------- checks by import


def target_problems(config: DictConfig) -> list[Problem]:
    """What is wrong with each `_target_`, once imported, and its arguments, held against its signature."""
    problems: list[Problem] = []
    plain = OmegaConf.to_container(config, resolve=True)
    for path, node in targets(plain):
        given = GIVEN.get(path, ())
        try:
            called = locate(node["_target_"])
        except (Exception, SystemExit) as error:
            key = f"{path}._target_={node['_target_']}"
            if isinstance(error, LookupError) and error.args and isinstance(error.args[0], Problem):
                problems.append(Problem(f"{key}: {error.args[0].cause}", error.args[0].mend))
            else:  # the module raised it as it was imported
                problems += UserCodeError(key, error).problems
            continue
        if not callable(called):
            problems.append(Problem(f"{path}._target_={node['_target_']}: it cannot be called", "name a class"))
            continue
        own = {key: value for key, value in node.items() if (path, key) != ("scheduler", "interval")}
        problems += wrong_arguments(path, own, called, given)
    return problems


def call(node: DictConfig, path: str, **extra: Any) -> Any:
    """What a node's `_target_` returns for its arguments (as plain containers) and the extra ones.

    Raises:
        UserCodeError: it raised an error; `path` says which key called it.
    """
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    if path == "scheduler":
        plain.pop("interval", None)  # ours, not the scheduler's
    for key in extra:
        plain.pop(key, None)
    try:
        return instantiate(plain | {"_partial_": True}, _convert_="all")(**extra)
    except InstantiationException as error:
        raise UserCodeError(path, error.__cause__ or error) from error
    except TrainkitError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(path, error) from error


# ----------------------------------------------------------------------------------------------- data


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
    )


# ------------------------------------------------------------------------- model, loss and optimizer


def build_model(node: DictConfig, train: Loader, where: torch.device) -> nn.Module:
    """The model, on its device: one `_target_`, or named children applied in order.

    Lazy layers take their shapes from the first training batch.
    """
    if "_target_" in node:
        model = call(node, "model")
    else:
        model = nn.Sequential()
        for name in map(str, node):
            model.add_module(name, _module(call(node[name], f"model.{name}"), f"model.{name}"))
    model = _module(model, "model").to(where)
    if any(is_lazy(p) for p in model.parameters()) or any(isinstance(m, LazyModuleMixin) for m in model.modules()):
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


def build_optimizer(config: DictConfig, model: nn.Module, loss_fn: nn.Module) -> tuple[list[optim.Group], Optimizer]:
    """The optimizer over the param groups that the rules make."""
    cls = locate(config.optim["_target_"])
    rules: Any = OmegaConf.to_container(config.param_groups, resolve=True)
    known = optim.options_of(cls)
    groups = optim.resolve(optim.named_params(model, loss_fn), rules, config.optim.get("lr"), known)
    if len(groups) > 1 and inspect.isclass(cls) and issubclass(cls, torch.optim.LBFGS):
        raise ConfigError("optim: LBFGS takes one param group", mend="write param_groups=none, or another optim")
    # torch checks only the optimizer's own values, so each group's are tried as such, on an optimizer thrown away.
    for group in groups:
        if group.options.keys() - {"lr"} and group.name != "default":
            call(
                config.optim,
                f"param_groups.{group.name}",
                params=[p.tensor for p in group.params],
                **group.options,
            )
    optimizer = call(config.optim, "optim", params=[group.for_optimizer() for group in groups])
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optim: {type(optimizer).__name__} is no torch.optim.Optimizer", mend="name a class of optimizers"
        )
    stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [id(p.tensor) for group in groups for p in group.params]
    if sorted(stepped) != sorted(wanted):
        raise ConfigError(
            "the optimizer does not hold each trainable parameter exactly once",
            mend="let it keep the params it is given",
        )
    return groups, optimizer


def build_scheduler(
    node: DictConfig | None, optimizer: Optimizer
) -> tuple[LRScheduler | ReduceLROnPlateau | None, str]:
    """The scheduler, and whether it steps each epoch or each step."""
    if not node:
        return None, "epoch"
    interval = str(node.get("interval", "epoch"))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = call(node, "scheduler", optimizer=optimizer)
    flattens = isinstance(scheduler, OneCycleLR | CyclicLR) and len({g["lr"] for g in optimizer.param_groups}) == 1
    if flattens and len(set(rates)) > 1:
        raise ConfigError(
            f"scheduler: {type(scheduler).__name__} gives all param groups one rate, theirs are {rates}",
            mend="give its rates as lists, one value a group",
        )
    return scheduler, interval


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


def watch_problems(names: Any, model: nn.Module) -> list[Problem]:
    """The names in `watch` that are no parameters of the model."""
    there = [name for name, _ in model.named_parameters(remove_duplicate=False)]
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


def remarks(config: DictConfig, training: Training, overrides: Sequence[str] = ()) -> list[str]:
    """What a person should know of a training before it starts; `overrides` are what they asked for."""
    state, lines = training.state, []
    if not training.split_off and any(text.startswith("data.split=0") for text in overrides):
        lines.append("note: this data has a validation set, so nothing is split off; data.val=null uses data.split")
    norms = [m for m in state.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if state.micro_batch is not None and norms:
        lines.append(f"note: {len(norms)} layers take batch statistics, and see {state.micro_batch} samples at a time")
    if any(not p.requires_grad for m in norms for p in m.parameters(recurse=False)):
        lines.append("note: frozen batch norm layers still follow the statistics of the batches they see")
    if config.param_groups:
        for group in training.groups:
            options = ", ".join(f"{key} {value}" for key, value in group.options.items())
            lines.append(f"param group {group.name}: {len(group.params)} tensors, {options}")
    return lines


def blame(error: BaseException, training: Training) -> UserCodeError:
    """An error out of the loop, with the config key whose object raised it.

    Before the first step it is a matter of config (exit code 2): the parts do not fit together.
    """
    state = training.state
    owners = [("model", state.model), ("loss", state.loss_fn), ("optim", state.optimizer)]
    owners += [("scheduler", state.scheduler), ("data.train", training.train), ("data.val", training.val)]
    owners += [(f"hooks.{name}", hook) for name, hook in training.hooks.items()]
    key, shapes = "training", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if {"inputs", "targets"} <= frame.f_locals.keys() and frame.f_code.co_filename == loop.__file__:
            shapes = f"inputs {_shape(frame.f_locals['inputs'])}, targets {_shape(frame.f_locals['targets'])}"
        key = next((name for name, owner in owners if frame.f_locals.get("self") is owner and owner is not None), key)
        if key != "training":
            break
    exit_code = 2 if state.step == 0 or key == "scheduler" else 1
    if key.startswith("data.") and isinstance(error, OSError):  # a sample that cannot be read
        exit_code = DataError.exit_code
    mend = ""
    if isinstance(error, IndexError) and "out of bounds" in str(error):
        mend = "the model has fewer outputs than the data has classes: see data.classes and the model's arguments"
    return UserCodeError(key, error, exit_code=exit_code, details=shapes, mend=mend)


def _shape(batch: Any) -> str:
    return f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, torch.Tensor) else type(batch).__name__

"""The only place where config becomes objects: model, loss, optimizer, scheduler, data, hooks."""

from __future__ import annotations

import inspect
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

from trainkit import device, optim
from trainkit.config import count_steps
from trainkit.errors import ConfigError, DataError, Problem, TrainkitError, UserCodeError, did_you_mean
from trainkit.loaders import Loader, Prepare, count_classes, make_loader, map_tensors, split
from trainkit.loop import EVENTS, State
from trainkit.rules import Options, Param, named_params
from trainkit.schedulers import Scheduler, keeping_ratios
from trainkit.targets import locate, missing_source, wrong_targets

CALLABLES = ("lr_lambda", "scale_fn")  # a scheduler's arguments that may be dotted paths


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
    step_schedulers, epoch_schedulers = build_schedulers(config.scheduler, optimizers)
    several = len(optimizers) > 1
    early_stop = config.early_stop or {"patience": None, "min_delta": 0.0}
    state = State(
        model=model,
        loss_fn=loss_fn,
        optimizer=optim.ChainedOptimizer(optimizers) if several else next(iter(optimizers.values())),
        device=where,
        epochs=config.epochs,
        step_schedulers=step_schedulers,
        epoch_schedulers=epoch_schedulers,
        ema_decay=config.ema,
        micro_batch=config.micro_batch,
        on_oom=on_oom(config.on_oom, model),
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        monitor=monitored(config, loss_fn, val),
        mode=config.monitor.mode,
        patience=early_stop["patience"],
        min_delta=early_stop["min_delta"],
        watch={param.name: param.tensor for param in named if param.name in config.watch},
    )
    hooks = {str(name): build_hook(name, node) for name, node in config.hooks.items()}
    return Training(state, train, val, hooks, groups, table, {p.name: p.tensor for p in named}, split_off)


def call(node: DictConfig | dict[str, Any], path: str, instead: Any = None, **extra: Any) -> Any:
    """What a node's `_target_` returns for its arguments (as plain containers) and the extra ones.

    With `instead`, that is called in place of what `_target_` names.

    Raises:
        UserCodeError: it raised an error; `path` says which key called it.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    for key in extra:
        plain.pop(key, None)
    try:
        made = instantiate(plain | {"_partial_": True}, _convert_="all")
        return (instead or made.func)(*made.args, **made.keywords, **extra)
    except InstantiationException as error:
        raise UserCodeError(path, error.__cause__ or error) from error
    except TrainkitError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(path, error) from error


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


def build_optimizers(
    config: DictConfig, params: list[Param]
) -> tuple[dict[str, Optimizer], list[optim.Group], dict[str, Options]]:
    """The optimizers by name, over the param groups that the rules make; the groups; their options.

    One optimizer goes by the name of its class, several by their names under `optim`.
    """
    plain: Any = OmegaConf.to_container(config.optim, resolve=True)
    several = "_target_" not in plain
    nodes = plain if several else {str(plain["_target_"]).rpartition(".")[2]: plain}
    paths = {name: f"optim.{name}" if several else "optim" for name in nodes}
    makers = {name: locate(node["_target_"]) for name, node in nodes.items()}
    options = {
        name: Options.of(makers[name], {key: value for key, value in node.items() if not key.startswith("_")})
        for name, node in nodes.items()
    }
    rules: Any = OmegaConf.to_container(config.param_groups, resolve=True)
    groups = optim.resolve(params, rules, options)
    optimizers = {}
    for name, node in nodes.items():
        own = [group for group in groups if group.optimizer == name]
        fits_groups(paths[name], makers[name], own, alone=not several)
        # torch checks only an optimizer's own values, so each group's are tried as such, on one thrown away.
        for group in own:
            if group.options.keys() - {"lr"} and group.name != "default":
                tensors = [param.tensor for param in group.params]
                call(node, f"param_groups.{group.name}", params=tensors, **group.options)
        optimizer = call(node, paths[name], params=[group.for_optimizer() for group in own])
        if not isinstance(optimizer, Optimizer):
            cause = f"{paths[name]}: {type(optimizer).__name__} is no torch.optim.Optimizer"
            raise ConfigError(cause, mend="name a class of optimizers")
        optimizers[name] = optimizer
    stepped = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    wanted = [id(p.tensor) for group in groups for p in group.params]
    if sorted(stepped) != sorted(wanted):
        raise ConfigError(
            "the optimizer does not hold each trainable parameter exactly once",
            mend="let it keep the params it is given",
        )
    return optimizers, groups, options


def fits_groups(path: str, cls: Any, groups: list[optim.Group], *, alone: bool) -> None:
    """Refuse what an optimizer cannot do, in words that name the parameters."""
    if inspect.isclass(cls) and issubclass(cls, torch.optim.LBFGS) and (len(groups) > 1 or not alone):
        raise ConfigError(f"{path}: LBFGS takes one param group", mend="write param_groups=none, or another optim")
    odd = [param for group in groups for param in group.params if param.tensor.dim() != 2]
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Muon) and odd:
        shown = ", ".join(f"{param.name} ({param.tensor.dim()}-D)" for param in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ConfigError(
            f"{path}: Muon takes 2-D parameters only, not {shown}{more}",
            mend="give it those alone and another optimizer the rest: optim=muon_sgd",
        )


def build_schedulers(
    node: DictConfig | None, optimizers: dict[str, Optimizer]
) -> tuple[list[Scheduler], list[Scheduler]]:
    """The schedulers that step with every step, and those that step with every epoch.

    A `_target_` is built for each optimizer, named children for the optimizers of those names.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if node else {}
    made: dict[str, list[Scheduler]] = {"step": [], "epoch": []}
    for name, optimizer in optimizers.items():
        path, own = ("scheduler", plain) if "_target_" in plain else (f"scheduler.{name}", plain.get(name))
        if own:
            made[own.get("interval", "epoch")].append(build_scheduler(own, path, optimizer))
    return made["step"], made["epoch"]


def build_scheduler(node: dict[str, Any], path: str, optimizer: Optimizer) -> Scheduler:
    """A scheduler, and those inside it, which keeps the ratios of the param groups' rates."""
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "interval")}
    inside = arguments.get("schedulers")
    if inside:
        named = inside.items() if isinstance(inside, dict) else enumerate(inside)
        arguments["schedulers"] = [build_scheduler(n, f"{path}.schedulers.{key}", optimizer) for key, n in named]
    for key in CALLABLES:
        if isinstance(arguments.get(key), str):
            arguments[key] = function(arguments[key], f"{path}.{key}")
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    cls, arguments = keeping_ratios(locate(node["_target_"]), arguments, optimizer)
    objects = {key: arguments.pop(key) for key in ("schedulers",) if key in arguments}
    own = {"_target_": node["_target_"], **arguments}
    scheduler: Scheduler = call(own, path, cls, optimizer=optimizer, **objects)
    now = {float(group["lr"]) for group in optimizer.param_groups}
    if len(set(rates)) > 1 and len(now) == 1 and now != {0.0}:
        raise ConfigError(
            f"{path}: {type(scheduler).__name__} gives all param groups one rate, theirs are {rates}",
            mend="give its rates as lists, one value a group",
        )
    return scheduler


def function(dotted: str, path: str) -> Any:
    """The function that a dotted path names."""
    key = f"{path}={dotted}"
    problem = missing_source(dotted)
    if problem:
        raise ConfigError(f"{key}: {problem.cause}", mend=problem.mend)
    try:
        return locate(dotted)
    except Exception as error:
        raise UserCodeError(key, error) from error


def on_oom(asked: str, model: nn.Module) -> str:
    """What to do where memory runs out: auto splits, but where layers see the batch's statistics."""
    if asked != "auto":
        return asked
    return "stop" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else "split"


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

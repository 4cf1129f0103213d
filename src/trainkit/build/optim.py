"""Build the optimizers with their param groups, and the schedulers of their learning rates."""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.build.instantiate import call_target, import_function
from trainkit.config.schema import UNNAMED, Node, key_path
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError, UserCodeError
from trainkit.core.source import name_and_place
from trainkit.optim.groups import Group, resolve_groups
from trainkit.optim.params import Param
from trainkit.optim.rules import OptimizerOptions
from trainkit.optim.schedulers import PER_GROUP_ARGUMENTS, Scheduler, keep_group_ratios
from trainkit.training.compile import skip_dynamo

# Options that torch reads from the optimizer's defaults only, not from the param groups.
OPTIMIZER_ONLY: dict[type, tuple[str, ...]] = {torch.optim.Adagrad: ("initial_accumulator_value",)}
IMPLEMENTATIONS = {"fused", "foreach", "differentiable", "capturable"}  # options that choose how a step is computed
CALLABLES = ("lr_lambda", "scale_fn")  # arguments of schedulers that may be dotted paths


def build_optimizers(
    settings: Settings, params: list[Param]
) -> tuple[dict[str, Optimizer], list[Group], dict[str, OptimizerOptions]]:
    """Build the optimizers over the param groups that the rules make.

    Returns:
        The optimizers by name, the groups, and the options of each optimizer. The name of an unnamed
        optimizer is its class.

    Raises:
        ConfigError: a rule or an optimizer does not fit the parameters.
    """
    nodes, paths = {}, {}
    for key, node in settings.optim.items():
        name = str(node["_target_"]).rpartition(".")[2] if key == UNNAMED else key
        nodes[name], paths[name] = node, key_path("optim", key)
    classes = {name: locate(node["_target_"]) for name, node in nodes.items()}
    options = {}
    for name, node in nodes.items():
        configured = {key: value for key, value in node.items() if not key.startswith("_")}
        options[name] = OptimizerOptions.from_signature(classes[name], configured)
    groups = resolve_groups(params, settings.param_groups, options)
    optimizers = {}
    for name, node in nodes.items():
        assigned = [group for group in groups if group.optimizer == name]
        check_groups(paths[name], classes[name], assigned, alone=len(nodes) == 1)
        optimizers[name] = skip_record(skip_dynamo(build_optimizer(node, paths[name], assigned)))
    optimized = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    trainable = [id(p.tensor) for group in groups for p in group.params]
    if sorted(optimized) != sorted(trainable):
        cause = "optim: the optimizer does not hold each trainable parameter exactly once"
        raise ConfigError(cause, hint="make the optimizer keep the `params` argument unchanged")
    return optimizers, groups, options


def build_optimizer(node: Node, path: str, groups: list[Group]) -> Optimizer:
    """Build an optimizer over its groups.

    Raises:
        ConfigError: the optimizer ignores an option of a group.
    """
    # torch validates only an optimizer's defaults; a throwaway optimizer validates each group.
    for group in groups:
        if group.options.keys() - {"lr"} and group.name != "default":
            tensors = [param.tensor for param in group.params]
            call_target(node, f"param_groups.{group.name}", params=tensors, **group.options)
    optimizer = try_fused(node, groups)
    if optimizer is None:
        optimizer = call_target(node, path, params=[group.as_param_group() for group in groups])
    if not isinstance(optimizer, Optimizer):
        cause = f"{path}: {type(optimizer).__name__} is not a torch.optim.Optimizer"
        raise ConfigError(cause, hint=f"write the dotted path of an optimizer class: {path}._target_=PATH")
    set_by_rule = {key for group in groups for key in group.options} - {"lr"}
    ignored = set_by_rule - optimizer.defaults.keys() | set_by_rule & {*OPTIMIZER_ONLY.get(type(optimizer), ())}
    if ignored:
        cause = f"param_groups: {type(optimizer).__name__} has one {', '.join(sorted(ignored))} for all parameters"
        raise ConfigError(cause, hint=f"write {path}.{min(ignored)}=VALUE, and remove the option from the rules")
    return optimizer


def try_fused(node: Node, groups: list[Group]) -> Optimizer | None:
    """Build torch's fused version of an optimizer, or return None if torch has none for these parameters.

    Fused kernels need a parameter and its gradient in the same dense memory layout.
    """
    cls = locate(node["_target_"])
    if not (inspect.isclass(cls) and issubclass(cls, Optimizer) and cls.__module__.startswith("torch.")):
        return None
    chosen = {*node, *(key for group in groups for key in group.options)}
    if "fused" not in inspect.signature(cls).parameters or chosen & IMPLEMENTATIONS:
        return None
    params = [param for group in groups for param in group.params]
    if any(has_gaps(p.tensor) or not p.tensor.is_floating_point() or getattr(p.owner, "sparse", False) for p in params):
        return None
    if any(options.get("dampening") for options in (node, *(group.options for group in groups))):
        return None  # see `prepare_fused` in training/step
    try:
        optimizer: Optimizer = call_target(node | {"fused": True}, "optim", params=[g.as_param_group() for g in groups])
        return optimizer
    except UserCodeError:  # not for this device or dtype; the plain optimizer reports other errors
        return None


def has_gaps(tensor: torch.Tensor) -> bool:
    """Return whether there is unused memory between a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last + 1 != tensor.numel()


def skip_record(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer, whose `zero_grad` does not record itself for torch's profiler from now on.

    The record takes 3% of the step of a small model. A class with a `zero_grad` of its own keeps it.
    """
    original = Optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            original(optimizer, set_to_none=False)
            return
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None

    if type(optimizer).zero_grad is original:
        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    return optimizer


def check_groups(path: str, cls: Any, groups: list[Group], *, alone: bool) -> None:
    """Raise ConfigError if an optimizer does not support its groups.

    Args:
        path: the optimizer's key in the config.
        cls: the optimizer's class.
        groups: the optimizer's param groups.
        alone: whether this is the only optimizer.
    """
    if inspect.isclass(cls) and issubclass(cls, torch.optim.LBFGS) and (len(groups) > 1 or not alone):
        found = f"{len(groups)} param groups" if alone else "several optimizers"
        cause = f"{path}: LBFGS supports only one param group with all parameters, found {found}"
        raise ConfigError(cause, hint="write param_groups=none, or choose another optim")
    odd = [param for group in groups for param in group.params if param.tensor.dim() != 2]
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Muon) and odd:
        shown = ", ".join(f"{param.name} ({param.tensor.dim()}-D)" for param in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        cause = f"{path}: Muon supports 2-D parameters only, found {shown}{more}"
        raise ConfigError(cause, hint="assign the other parameters to another optimizer: optim=muon_sgd")


def build_schedulers(settings: Settings, optimizers: dict[str, Optimizer]) -> tuple[list[Scheduler], list[Scheduler]]:
    """Build the schedulers; return those that step every step, and those that step every epoch.

    An unnamed scheduler is built for each optimizer, a named scheduler for the optimizer of its name.
    """
    built: dict[str, list[Scheduler]] = {"step": [], "epoch": []}
    for name, optimizer in optimizers.items():
        key = UNNAMED if UNNAMED in settings.scheduler else name
        path, node = key_path("scheduler", key), settings.scheduler.get(key)
        if not node:
            continue
        lr = optimizer.defaults.get("lr")
        if lr is None:
            raise ConfigError(f"{path}: {name} has no lr to schedule", hint="write scheduler=none")
        # The learning rates of a scheduler for several optimizers refer to the root key lr.
        shared = key == UNNAMED and len(optimizers) > 1
        base = settings.lr if shared and settings.lr is not None else float(lr)
        ratios = [float(group["lr"]) / base if base else 1.0 for group in optimizer.param_groups]
        try_scheduler(node, path, optimizer, ratios)
        built[node.get("interval", "epoch")].append(build_scheduler(node, path, optimizer, ratios))
    return built["step"], built["epoch"]


def try_scheduler(node: Node, path: str, optimizer: Optimizer, ratios: list[float]) -> None:
    """Step a copy of the scheduler once, over an optimizer without parameters.

    Raises:
        UserCodeError: the step fails. Without the copy, it would fail after the first epoch.
    """
    copied = copy.copy(optimizer)
    copied.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    try:
        scheduler = build_scheduler(node, path, copied, ratios)
    except UserCodeError as error:
        details, hint = _not_a_list(error.error)
        if not hint:
            raise
        raise UserCodeError(path, error.error, details=details, hint=hint) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped yet
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
    except Exception as error:
        details, hint = _not_a_list(error)
        raise UserCodeError(path, error, details=details, hint=hint) from error


def _not_a_list(error: BaseException) -> tuple[str, str]:
    """Return the place and the fix if `get_lr` of a scheduler returns a number, as torch does not name it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    schedulers = [frame.f_locals["self"] for frame in frames if hasattr(frame.f_locals.get("self"), "get_lr")]
    if not schedulers or not isinstance(error, TypeError) or "object is not iterable" not in str(error):
        return "", ""
    hint = "return a list from get_lr, with the learning rate of each param group"
    return name_and_place(schedulers[-1], "get_lr"), hint


def build_scheduler(node: Node, path: str, optimizer: Optimizer, ratios: list[float]) -> Scheduler:
    """Build a scheduler and its inner schedulers. They keep the ratios between the groups' learning rates.

    Raises:
        ConfigError: the scheduler gives all groups the same learning rate.
    """
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "interval")}
    inner = arguments.pop("schedulers", None)
    objects = {}
    if inner is not None:
        named = inner.items() if isinstance(inner, dict) else enumerate(inner)
        objects["schedulers"] = [build_scheduler(n, f"{path}.schedulers.{key}", optimizer, ratios) for key, n in named]
    arguments |= {key: _import_functions(arguments[key], f"{path}.{key}") for key in CALLABLES if key in arguments}
    cls, arguments = keep_group_ratios(locate(node["_target_"]), arguments, ratios)
    target = {"_target_": node["_target_"], **arguments}
    scheduler: Scheduler = call_target(target, path, cls, optimizer=optimizer, **objects)
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    per_group = any(isinstance(arguments.get(key), list) for key in PER_GROUP_ARGUMENTS)
    if len(set(ratios)) > 1 and len(rates) == 1 and rates != {0.0} and not per_group:
        name = type(scheduler).__name__
        raise ConfigError(
            f"{path}: {name} gives all param groups one learning rate, but their ratios are {ratios}",
            hint="write the learning rates as lists with one value for each group",
        )
    return scheduler


def _import_functions(value: Any, path: str) -> Any:
    """Import a dotted path, or each dotted path in a list. Return any other value unchanged."""
    if isinstance(value, list):
        return [_import_functions(item, path) for item in value]
    return import_function(value, path) if isinstance(value, str) else value

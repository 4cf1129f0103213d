"""Config to optimizers over their param groups, and to the schedulers of their rates."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.build.instantiate import call_target, import_function
from trainkit.config.consistency import is_off
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError, UserCodeError
from trainkit.optim import groups as optim
from trainkit.optim.params import Param
from trainkit.optim.rules import OptimizerOptions
from trainkit.optim.schedulers import PER_GROUP_ARGUMENTS, Scheduler, keep_group_ratios
from trainkit.training.compile import skip_dynamo

# Options of which torch reads the optimizer's own value alone.
ONCE: dict[type, tuple[str, ...]] = {torch.optim.Adagrad: ("initial_accumulator_value",)}
ANOTHER_WAY = {"fused", "foreach", "differentiable", "capturable"}  # options that say how to compute a step
CALLABLES = ("lr_lambda", "scale_fn")  # a scheduler's arguments that may be dotted paths


def build_optimizers(
    config: DictConfig, params: list[Param]
) -> tuple[dict[str, Optimizer], list[optim.Group], dict[str, OptimizerOptions]]:
    """The optimizers by name, over the param groups that the rules make; the groups; their options.

    One optimizer goes by the name of its class, several by their names under `optim`.
    """
    plain: Any = OmegaConf.to_container(config.optim, resolve=True)
    several = "_target_" not in plain
    nodes = plain if several else {str(plain["_target_"]).rpartition(".")[2]: plain}
    paths = {name: f"optim.{name}" if several else "optim" for name in nodes}
    makers = {name: locate(node["_target_"]) for name, node in nodes.items()}
    options = {
        name: OptimizerOptions.from_signature(
            makers[name], {key: value for key, value in node.items() if not key.startswith("_")}
        )
        for name, node in nodes.items()
    }
    given: Any = OmegaConf.to_container(config.param_groups, resolve=True)
    rules = {name: rule for name, rule in given.items() if not is_off(rule)}
    groups = optim.resolve_groups(params, rules, options)
    optimizers = {}
    for name, node in nodes.items():
        own = [group for group in groups if group.optimizer == name]
        fits_groups(paths[name], makers[name], own, alone=not several)
        optimizers[name] = skip_dynamo(build_optimizer(node, paths[name], own))
    stepped = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    wanted = [id(p.tensor) for group in groups for p in group.params]
    if sorted(stepped) != sorted(wanted):
        raise ConfigError(
            "the optimizer does not hold each trainable parameter exactly once",
            hint="let it keep the params it is given",
        )
    return optimizers, groups, options


def build_optimizer(node: dict[str, Any], path: str, groups: list[optim.Group]) -> Optimizer:
    """One optimizer over its groups, whose every option it must take into account."""
    # torch checks only an optimizer's own values, so each group's are tried as such, on one thrown away.
    for group in groups:
        if group.options.keys() - {"lr"} and group.name != "default":
            tensors = [param.tensor for param in group.params]
            call_target(node, f"param_groups.{group.name}", params=tensors, **group.options)
    optimizer = fused(node, groups) or call_target(node, path, params=[group.as_param_group() for group in groups])
    if not isinstance(optimizer, Optimizer):
        cause = f"{path}: {type(optimizer).__name__} is no torch.optim.Optimizer"
        raise ConfigError(cause, hint="name a class of optimizers")
    set_by_rule = {key for group in groups for key in group.options} - {"lr"}
    once = set_by_rule - optimizer.defaults.keys() | set_by_rule & {*ONCE.get(type(optimizer), ())}
    if once:
        raise ConfigError(
            f"param_groups: {type(optimizer).__name__} takes {', '.join(sorted(once))} once for all parameters",
            hint=f"write {path}.{min(once)}=VALUE, and no rule for it",
        )
    return optimizer


def fused(node: dict[str, Any], groups: list[optim.Group]) -> Optimizer | None:
    """The optimizer as torch has it fused, all parameters of a group in one pass; None where it has not.

    Its kernels take a parameter and its gradient to lie in memory in the same order, without gaps.
    """
    maker = locate(node["_target_"])
    if not (inspect.isclass(maker) and issubclass(maker, Optimizer) and maker.__module__.startswith("torch.")):
        return None
    chosen = {*node, *(key for group in groups for key in group.options)}
    if "fused" not in inspect.signature(maker).parameters or chosen & ANOTHER_WAY:
        return None
    params = [param for group in groups for param in group.params]
    if any(has_gaps(p.tensor) or not p.tensor.is_floating_point() or getattr(p.owner, "sparse", False) for p in params):
        return None
    if any(options.get("dampening") for options in (node, *(group.options for group in groups))):
        return None  # see `steps.fit_fused`
    try:
        optimizer: Optimizer = call_target(node | {"fused": True}, "optim", params=[g.as_param_group() for g in groups])
        return optimizer
    except UserCodeError:  # not on this device, or not of this type; what else is wrong the plain one tells
        return None


def has_gaps(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements do not lie side by side in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last + 1 != tensor.numel()


def fits_groups(path: str, cls: Any, groups: list[optim.Group], *, alone: bool) -> None:
    """Refuse what an optimizer cannot do, in words that name the parameters."""
    if inspect.isclass(cls) and issubclass(cls, torch.optim.LBFGS) and (len(groups) > 1 or not alone):
        raise ConfigError(f"{path}: LBFGS takes one param group", hint="write param_groups=none, or another optim")
    odd = [param for group in groups for param in group.params if param.tensor.dim() != 2]
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Muon) and odd:
        shown = ", ".join(f"{param.name} ({param.tensor.dim()}-D)" for param in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ConfigError(
            f"{path}: Muon takes 2-D parameters only, not {shown}{more}",
            hint="give it those alone and another optimizer the rest: optim=muon_sgd",
        )


def build_schedulers(config: DictConfig, optimizers: dict[str, Optimizer]) -> tuple[list[Scheduler], list[Scheduler]]:
    """The schedulers that step with every step, and those that step with every epoch.

    A `_target_` is built for each optimizer, named children for the optimizers of those names.
    """
    plain: Any = OmegaConf.to_container(config.scheduler, resolve=True) if config.scheduler else {}
    made: dict[str, list[Scheduler]] = {"step": [], "epoch": []}
    for name, optimizer in optimizers.items():
        shared = "_target_" in plain
        path, own = ("scheduler", plain) if shared else (f"scheduler.{name}", plain.get(name))
        if not own:
            continue
        lr = optimizer.defaults.get("lr")
        if lr is None:
            raise ConfigError(f"{path}: {name} has no lr to schedule", hint="write scheduler=none")
        # The numbers of a scheduler for all optimizers are meant for the root's rate.
        base = float(config.lr if shared and len(optimizers) > 1 and config.lr is not None else lr)
        ratios = [float(group["lr"]) / base if base else 1.0 for group in optimizer.param_groups]
        rehearse(own, path, optimizer, ratios)
        made[own.get("interval", "epoch")].append(build_scheduler(own, path, optimizer, ratios))
    return made["step"], made["epoch"]


def rehearse(node: dict[str, Any], path: str, optimizer: Optimizer, ratios: list[float]) -> None:
    """Step a scheduler once over a copy without parameters: an epoch need not end to tell what cannot work."""
    twin = copy.copy(optimizer)
    twin.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    scheduler = build_scheduler(node, path, twin, ratios)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses an optimizer's step before it
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
    except Exception as error:
        raise UserCodeError(path, error) from error


def build_scheduler(node: dict[str, Any], path: str, optimizer: Optimizer, ratios: list[float]) -> Scheduler:
    """A scheduler, and those inside it, which keeps the ratios of the param groups' rates."""
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "interval")}
    inside = arguments.pop("schedulers", None)
    objects = {}
    if inside is not None:
        named = inside.items() if isinstance(inside, dict) else enumerate(inside)
        objects["schedulers"] = [build_scheduler(n, f"{path}.schedulers.{key}", optimizer, ratios) for key, n in named]
    for key in CALLABLES:
        given = arguments.get(key)
        if isinstance(given, str):
            arguments[key] = import_function(given, f"{path}.{key}")
        elif isinstance(given, list):
            arguments[key] = [
                import_function(item, f"{path}.{key}") if isinstance(item, str) else item for item in given
            ]
    cls, arguments = keep_group_ratios(locate(node["_target_"]), arguments, ratios)
    own = {"_target_": node["_target_"], **arguments}
    scheduler: Scheduler = call_target(own, path, cls, optimizer=optimizer, **objects)
    now = {float(group["lr"]) for group in optimizer.param_groups}
    asked = any(isinstance(arguments.get(key), list) for key in PER_GROUP_ARGUMENTS)
    if len(set(ratios)) > 1 and len(now) == 1 and now != {0.0} and not asked:
        raise ConfigError(
            f"{path}: {type(scheduler).__name__} gives all param groups one rate, theirs go as {ratios}",
            hint="give its rates as lists, one value a group",
        )
    return scheduler

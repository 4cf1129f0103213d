"""The states of optimizers and schedulers, stored by the names of parameters and groups instead of their positions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit.core.shards import shard_as

SCHEDULER_OPTIONS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # schedulers add these options
KERNEL_OPTIONS = ("fused", "foreach")  # these change how a step is computed, and results to rounding only


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with parameter names instead of numbers."""
    packed, names = optimizer.state_dict(), _param_names(optimizer)
    order = [name for in_group in names.values() for name in in_group]
    state = packed.get("state", {})
    groups = {
        name: {key: value for key, value in group.items() if key != "params"}
        for name, group in zip(names, packed.get("param_groups", []), strict=True)
    }
    return {
        "state": {order[key]: content for key, content in state.items() if isinstance(key, int)},
        "state_of_no_parameter": {key: content for key, content in state.items() if not isinstance(key, int)},
        "groups": groups,
        "more": {key: value for key, value in packed.items() if key not in ("state", "param_groups")},
    }


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], *, with_options: bool) -> None:
    """Restore what `optimizer_state` returned; the order of parameters and groups may differ.

    Args:
        optimizer: the optimizer.
        saved: the state; the optimizer keeps its tensors.
        with_options: restore the options (the arguments of the optimizer) too.

    Raises:
        ValueError: the groups or parameters differ, or an option has the wrong type.
    """
    names = _param_names(optimizer)
    order = [name for in_group in names.values() for name in in_group]
    check_same_names(names, saved["groups"], "param groups")
    check_same_names(order, {*order, *saved["state"]}, "optimized parameters")
    number = {name: index for index, name in enumerate(order)}
    ignored = set(KERNEL_OPTIONS) if with_options else {*KERNEL_OPTIONS, *_options(optimizer)}
    groups = []
    for group, name in zip(optimizer.param_groups, names, strict=True):
        content = saved["groups"][name]
        check_same_names(names[name], content.get("param_names", names[name]), f"parameters of group {name}")
        merged = _merged_group(group, {key: value for key, value in content.items() if key not in ignored}, name)
        groups.append({**merged, "params": [number[param] for param in names[name]]})
    params = dict(zip(order, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    saved_states = {name: shard_as(content, params[name]) for name, content in saved["state"].items()}
    states = {number[name]: content for name, content in saved_states.items()}
    whole = {"state": states | saved["state_of_no_parameter"], "param_groups": groups}
    optimizer.load_state_dict({**saved["more"], **whole})
    for name, content in saved_states.items():
        param = params[name]
        if param in optimizer.state:
            optimizer.state[param] = _with_saved_dtypes(optimizer.state[param], content, param)


def restore_scheduler(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Restore the state of a scheduler; plain containers get back the types that the scheduler uses.

    Raises:
        ValueError: an entry is missing. Private entries may be: they differ between versions of torch.
    """
    current = scheduler.state_dict()
    lacking = [key for key, value in current.items() if key not in saved and key[:1] != "_" and not callable(value)]
    if lacking:
        raise ValueError(f"the state of {type(scheduler).__name__} lacks {', '.join(lacking)}")
    scheduler.load_state_dict(_with_types_of(current, saved))


def check_same_names(here: Iterable[Any], saved: Iterable[Any], what: str) -> None:
    """Raise `ValueError` with the differences if two sets of names differ."""
    ours, theirs = set(map(str, here)), set(map(str, saved))
    if ours != theirs:
        parts = [f"it has {', '.join(sorted(theirs - ours)[:5])}"] if theirs - ours else []
        parts += [f"it lacks {', '.join(sorted(ours - theirs)[:5])}"] if ours - theirs else []
        raise ValueError(f"its {what} differ: {'; '.join(parts)}")


def _param_names(optimizer: Optimizer) -> dict[str, list[str]]:
    """Return the names of each group's parameters; their numbers if they have no names."""
    names, number = {}, 0
    for position, group in enumerate(optimizer.param_groups):
        numbers = [str(number + i) for i in range(len(group["params"]))]
        names[str(group.get("name", position))] = [str(name) for name in group.get("param_names", numbers)]
        number += len(numbers)
    return names


def _options(optimizer: Optimizer) -> set[str]:
    """Return the options that the config sets; every other entry of a group is state of the optimizer."""
    signature = inspect.signature(type(optimizer).__init__).parameters.values()
    options = {"lr", *(parameter.name for parameter in signature), *SCHEDULER_OPTIONS}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        options |= set(optimizer.defaults)
    return options


def _merged_group(group: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a param group with saved entries; it keeps its own names."""
    for key, value in saved.items():
        if isinstance(group.get(key), int | float) and not isinstance(value, int | float | Tensor):
            raise ValueError(f"{key} of param group {name} is {value!r}, expected a number")
    return {**group, **saved, **{key: group[key] for key in ("name", "param_names") if key in group}}


def _with_saved_dtypes(loaded: Any, saved: Any, param: Tensor) -> Any:
    """Return the loaded state of a parameter with the saved dtypes; torch casts state to the parameter's dtype.

    A tensor of the parameter's shape gets the parameter's strides, because fused optimizers read both in memory order.
    """
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        kept = loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
        if kept.shape == param.shape and kept.stride() != param.stride():
            return torch.empty_like(param, dtype=kept.dtype, device=kept.device).copy_(kept)
        return kept
    if isinstance(saved, Mapping) and isinstance(loaded, Mapping):
        return {key: _with_saved_dtypes(loaded.get(key), value, param) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(loaded) == len(saved):
        return type(saved)(_with_saved_dtypes(ours, value, param) for ours, value in zip(loaded, saved, strict=True))
    return saved if loaded is None else loaded


def _with_types_of(present: Any, saved: Any) -> Any:
    """Return a saved value with the types of the present value: a dict becomes a Counter, a list a set."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        content = {key: _with_types_of(present.get(key), value) for key, value in saved.items()}
        if type(present) is dict:
            return content
        typed: Any = copy.copy(present)
        typed.clear()
        typed.update(content)
        return typed
    if isinstance(saved, list) and isinstance(present, set | frozenset):
        return type(present)(saved)
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        return [_with_types_of(ours, value) for ours, value in zip(present, saved, strict=True)]
    if isinstance(saved, Tensor) and isinstance(present, np.ndarray):
        return saved.numpy()
    return saved

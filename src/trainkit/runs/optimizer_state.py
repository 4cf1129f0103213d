"""An optimizer's state by the names of its parameters and groups: their order may change, their types may not."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SCHEDULED = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # options that schedulers add

MACHINERY = ("fused", "foreach")  # options that change how a step is computed, and no number beyond rounding


def _names(optimizer: Optimizer) -> dict[str, list[str]]:
    """The names of each group's parameters; their numbers where there are none."""
    names, number = {}, 0
    for place, group in enumerate(optimizer.param_groups):
        numbers = [str(number + i) for i in range(len(group["params"]))]
        names[str(group.get("name", place))] = [str(name) for name in group.get("param_names", numbers)]
        number += len(numbers)
    return names


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """What the optimizer's own `state_dict` gives, with names where it has numbers."""
    packed, names = optimizer.state_dict(), _names(optimizer)
    order = [name for inside in names.values() for name in inside]
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
    names = _names(optimizer)
    order = [name for inside in names.values() for name in inside]
    check_same_names(names, saved["groups"], "param groups")
    check_same_names(order, {*order, *saved["state"]}, "optimized parameters")
    number = {name: index for index, name in enumerate(order)}
    signature = inspect.signature(type(optimizer).__init__).parameters.values()
    arguments = {"lr", *(parameter.name for parameter in signature), *SCHEDULED}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        arguments |= set(optimizer.defaults)
    groups = []
    for group, name in zip(optimizer.param_groups, names, strict=True):
        there = saved["groups"][name]
        check_same_names(names[name], there.get("param_names", names[name]), f"parameters of group {name}")
        own = {key: value for key, value in group.items() if key != "params"}
        # What is no argument is state of the optimizer's, whatever the config says.
        kept = {key: value for key, value in there.items() if with_options or key not in arguments}
        kept = {key: value for key, value in kept.items() if key not in MACHINERY}
        for key, value in kept.items():
            if isinstance(own.get(key), int | float) and not isinstance(value, int | float | Tensor):
                raise ValueError(f"{key} of param group {name} is {value!r}")
        named = {key: own[key] for key in ("name", "param_names") if key in own}
        groups.append({**own, **kept, **named, "params": [number[inside] for inside in names[name]]})
    contents = {number[name]: content for name, content in saved["state"].items()}
    whole = {"state": contents | saved["state_of_no_parameter"], "param_groups": groups}
    optimizer.load_state_dict({**saved["more"], **whole})
    zipped = zip(optimizer.param_groups, names.values(), strict=True)
    params = {name: p for group, inside in zipped for name, p in zip(inside, group["params"], strict=True)}
    for name, content in saved["state"].items():
        if params[name] in optimizer.state:
            optimizer.state[params[name]] = _as_saved(optimizer.state[params[name]], content, params[name])


def _as_saved(here: Any, saved: Any, param: Tensor) -> Any:
    """An optimizer's state with the types that were saved: torch gives every tensor that of its parameter.

    A tensor of the parameter's shape gets its strides, too: fused optimizers walk both in the order in
    which they lie in memory, whatever `memory_format` they were saved with.
    """
    if isinstance(saved, Tensor) and isinstance(here, Tensor):
        kept = here if here.dtype == saved.dtype else saved.to(here.device)
        if kept.shape == param.shape and kept.stride() != param.stride():
            return torch.empty_like(param, dtype=kept.dtype, device=kept.device).copy_(kept)
        return kept
    if isinstance(saved, Mapping) and isinstance(here, Mapping):
        return {key: _as_saved(here.get(key), value, param) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(here, list | tuple) and len(here) == len(saved):
        return type(saved)(_as_saved(mine, value, param) for mine, value in zip(here, saved, strict=True))
    return saved if here is None else here


def check_same_names(here: Iterable[Any], there: Iterable[Any], what: str) -> None:
    """Raise `ValueError` with what differs, where two sets of names are not the same."""
    mine, others = set(map(str, here)), set(map(str, there))
    if mine != others:
        parts = [f"it has {', '.join(sorted(others - mine)[:5])}"] if others - mine else []
        parts += [f"it lacks {', '.join(sorted(mine - others)[:5])}"] if mine - others else []
        raise ValueError(f"its {what} are others: {'; '.join(parts)}")


def copy_to_cpu(saved: Any) -> Any:
    """What `remember` gave, with copies of its tensors on the CPU, which later steps leave alone."""
    if isinstance(saved, Tensor):
        return saved.detach().to("cpu", copy=True)
    if isinstance(saved, OrderedDict):  # a module's, with what torch notes of it
        copied = OrderedDict((key, copy_to_cpu(value)) for key, value in saved.items())
        copied.__dict__.update(saved.__dict__)
        return copied
    if isinstance(saved, Mapping):
        return {key: copy_to_cpu(value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(copy_to_cpu(value) for value in saved)
    return saved

"""All that a training is, as plain containers and tensors, and back: nothing but what is named here is kept."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.device import random_state, set_random_state
from trainkit.errors import CheckpointError
from trainkit.optim import ChainedOptimizer
from trainkit.state import State

FORMAT = 1
KEYS = (
    "format",
    "model",
    "loss",
    "optimizers",
    "schedulers",
    "scaler",
    "ema",
    "epoch",
    "batch",
    "step",
    "metrics",
    "best",
    "early_stop",
    "rng",
    "fingerprint",
)
RATES = {"lr", "optim", "param_groups", "scheduler"}  # config keys whose change gives a new plan of the rates
CLOCKS = ("seconds", "samples_per_second")


def remember(state: State, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A training on a step boundary, as `torch.load(weights_only=True)` reads it back.

    Optimizers are kept by the names of their parameters and groups. The tensors are the training's own,
    not copies: they are to be written before the next step.

    Args:
        state: of the training.
        fingerprint: what its numbers depend on, for comparing only.

    Raises:
        CheckpointError: something in it cannot be stored.
    """
    optimizers = {name: _optimizer_state(optimizer) for name, optimizer in _optimizers(state).items()}
    return {
        "format": FORMAT,
        "model": _module_state(state.model.state_dict(), "model"),
        "loss": _module_state(state.loss_fn.state_dict(), "loss"),
        "optimizers": _plain(optimizers, "optimizers", without_callables=True),
        "schedulers": _plain([s.state_dict() for s in _schedulers(state)], "schedulers", without_callables=True),
        "scaler": None,
        "ema": None if state.ema is None else _module_state(state.ema.state_dict(), "ema"),
        "epoch": state.epoch,
        "batch": state.batch,
        "step": state.step,
        "metrics": {
            "numerator": state.loss.numerator,
            "denominator": state.loss.denominator,
            "seen": state.seen,
            "skipped": state.skipped,
            "seconds": time.perf_counter() - state.began,
            # of the epoch's last step, which are reported once the epoch is validated
            "rates": dict(state.rates),
            "grad_norm": state.grad_norm,
            "gradients": dict(state.gradients),
        },
        "best": _plain(state.best, "best"),
        "early_stop": {"epochs_since_best": state.epochs_since_best, "reference": state.patience_reference},
        "rng": random_state(),
        "fingerprint": _plain(fingerprint, "fingerprint"),
    }


def restore(state: State, saved: Mapping[str, Any], changed: Collection[str] = ()) -> None:
    """Put a training back to where `remember` saw it.

    Where its config has other rates now (`changed` names one of `RATES`, a longer `epochs` among the
    causes), its options are the config's, and the schedulers are stepped to where they would be if the
    run had been planned so from the start. One that goes by a plateau keeps its count.

    Raises:
        CheckpointError: what was saved is not of this training's parts.
    """
    with _fitting():
        restore_weights(state, saved, changed)
        metrics, early = saved["metrics"], saved["early_stop"]
        state.epoch, state.batch = _count(saved["epoch"]), _count(saved["batch"])
        state.loss.numerator.copy_(metrics["numerator"])
        state.loss.denominator.copy_(metrics["denominator"])
        state.seen, state.skipped = _count(metrics["seen"]), _count(metrics["skipped"])
        state.began = time.perf_counter() - float(metrics["seconds"])
        state.rates, state.gradients = dict(metrics["rates"]), dict(metrics["gradients"])
        state.grad_norm = metrics["grad_norm"]
        if "monitor" in changed:  # the best by one metric is not the best by another
            return set_random_state(saved["rng"])
        state.best = saved["best"]
        state.epochs_since_best, state.patience_reference = _count(early["epochs_since_best"]), early["reference"]
        state.stopped_early = state.patience is not None and state.epochs_since_best >= state.patience
        return set_random_state(saved["rng"])


def restore_weights(state: State, saved: Mapping[str, Any], changed: Collection[str] = ()) -> None:
    """Put back what the steps have made: weights, optimizers, schedulers, averages; not where the data stands.

    Raises:
        CheckpointError: what was saved is not of this training's parts.
    """
    with _fitting():
        planned_anew = bool(RATES & set(changed))
        state.step = _count(saved["step"])
        state.model.load_state_dict(saved["model"])
        state.loss_fn.load_state_dict(saved["loss"])
        optimizers, schedulers = _optimizers(state), _schedulers(state)
        _same(optimizers, saved["optimizers"], "optimizers")
        if (state.ema is None) != (saved["ema"] is None):
            raise ValueError("ema: one has it, the other has not")
        if state.ema is not None:
            state.ema.load_state_dict(saved["ema"])
        for name, optimizer in optimizers.items():
            _restore_optimizer(optimizer, saved["optimizers"][name], with_options=not planned_anew)
            optimizer._opt_called = state.step > 0  # type: ignore[attr-defined]  # or torch's schedulers warn
        if planned_anew:
            rates_kept = not {"lr", "param_groups"} & set(changed)
            for scheduler in schedulers:
                _plan_anew(scheduler, state, saved, rates_kept=rates_kept)
            return
        if len(schedulers) != len(saved["schedulers"]):
            raise ValueError(f"it has {len(saved['schedulers'])} schedulers, this training {len(schedulers)}")
        for scheduler, content in zip(schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(_like(scheduler.state_dict(), content))


def in_host_memory(saved: Any) -> Any:
    """What `remember` gave, with copies of its tensors on the CPU, which later steps leave alone."""
    if isinstance(saved, Tensor):
        return saved.detach().to("cpu", copy=True)
    if isinstance(saved, OrderedDict):  # a module's, with what torch notes of it
        copied = OrderedDict((key, in_host_memory(value)) for key, value in saved.items())
        copied.__dict__.update(saved.__dict__)
        return copied
    if isinstance(saved, Mapping):
        return {key: in_host_memory(value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(in_host_memory(value) for value in saved)
    return saved


def digest(saved: Mapping[str, Any]) -> str:
    """The sha256 of all that `remember` gave, the fingerprint and the clocks aside, in hexadecimal."""
    whole = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                if key not in CLOCKS:
                    whole.update(f"{key}:".encode())
                    add(value[key])
        elif isinstance(value, list | tuple):
            whole.update(f"[{len(value)}]".encode())
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            real = torch.view_as_real(value) if value.is_complex() else value
            whole.update(f"{value.dtype}{tuple(value.shape)}".encode())
            whole.update(real.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            whole.update(f"{type(value).__name__} {value!r};".encode())

    add({key: value for key, value in saved.items() if key != "fingerprint"})
    return whole.hexdigest()


# ----------------------------------------------------------------------------------- optimizers by name


def _optimizers(state: State) -> dict[str, Optimizer]:
    if isinstance(state.optimizer, ChainedOptimizer):
        return state.optimizer.optimizers
    return {"optim": state.optimizer}


def _names(optimizer: Optimizer) -> dict[str, list[str]]:
    """The names of each group's parameters; their numbers where there are none."""
    names, number = {}, 0
    for place, group in enumerate(optimizer.param_groups):
        numbers = [str(number + i) for i in range(len(group["params"]))]
        names[str(group.get("name", place))] = [str(name) for name in group.get("param_names", numbers)]
        number += len(numbers)
    return names


def _optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    names = _names(optimizer)
    zipped = list(zip(optimizer.param_groups, names, strict=True))
    name_of = {id(p): own for group, name in zipped for p, own in zip(group["params"], names[name], strict=True)}
    groups = {name: {key: value for key, value in group.items() if key != "params"} for group, name in zipped}
    return {"state": {name_of[id(p)]: content for p, content in optimizer.state.items()}, "groups": groups}


def _restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], *, with_options: bool) -> None:
    names = _names(optimizer)
    order = [name for inside in names.values() for name in inside]
    _same(names, saved["groups"], "param groups")
    _same(order, {*order, *saved["state"]}, "optimized parameters")
    number = {name: index for index, name in enumerate(order)}
    groups = []
    for group, name in zip(optimizer.param_groups, names, strict=True):
        there = saved["groups"][name].get("param_names", names[name])
        _same(names[name], there, f"parameters of group {name}")
        own = {key: value for key, value in group.items() if key != "params"}
        options = saved["groups"][name] if with_options else {}
        kept = {key: own[key] for key in ("name", "param_names") if key in own}
        groups.append({**own, **options, **kept, "params": [number[inside] for inside in names[name]]})
    contents = {number[name]: content for name, content in saved["state"].items()}
    optimizer.load_state_dict({"state": contents, "param_groups": groups})
    params = {
        name: p
        for group, own in zip(optimizer.param_groups, names.values(), strict=True)
        for name, p in zip(own, group["params"], strict=True)
    }
    for name, content in saved["state"].items():  # torch gives every tensor the type of its parameter
        here = optimizer.state[params[name]]
        for key, value in content.items() if isinstance(content, Mapping) else ():
            if isinstance(value, Tensor) and here[key].dtype != value.dtype:
                here[key] = value.to(here[key].device)


# ------------------------------------------------------------------------------------------ schedulers


def _schedulers(state: State) -> list[Any]:
    return [*state.step_schedulers, *state.epoch_schedulers]


def _plan_anew(scheduler: Any, state: State, saved: Mapping[str, Any], *, rates_kept: bool) -> None:
    """Step a new scheduler as often as the old one was."""
    if isinstance(scheduler, ReduceLROnPlateau):
        place = _schedulers(state).index(scheduler)
        if place < len(saved["schedulers"]) and "num_bad_epochs" in saved["schedulers"][place]:
            counted = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
            scheduler.load_state_dict({key: saved["schedulers"][place][key] for key in counted})
        if rates_kept:
            groups = {name: own for kept in saved["optimizers"].values() for name, own in kept["groups"].items()}
            for group in scheduler.optimizer.param_groups:
                group["lr"] = groups[group["name"]]["lr"]
        return
    times = state.step if scheduler in state.step_schedulers else saved["epoch"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps in between
        for _ in range(times):
            scheduler.step()


def _like(present: Any, saved: Any) -> Any:
    """What was saved with the types that are there: a plain dict becomes the Counter that it was."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        content = {key: _like(present.get(key), value) for key, value in saved.items()}
        return content if type(present) is dict else type(present)(content)  # type: ignore[call-arg]
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        return [_like(mine, value) for mine, value in zip(present, saved, strict=True)]
    return saved


# --------------------------------------------------------------------------------- plain, and as expected


def _module_state(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A module's state, with what torch notes of the versions of its layers."""
    plain = OrderedDict(_plain(dict(content), where))
    plain._metadata = getattr(content, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return plain


def _plain(value: Any, where: str, *, without_callables: bool = False) -> Any:
    """Containers and numbers of other libraries as Python's own.

    Raises:
        CheckpointError: something that only pickle could store.
    """
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not (without_callables and callable(item))}
        return {key: _plain(item, f"{where}.{key}", without_callables=without_callables) for key, item in kept.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item, where, without_callables=without_callables) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return value.detach()
    if value is None:
        return None
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):  # or one derived from it, as torch's version is
            return value if type(value) is kind else kind(value)
    raise CheckpointError(
        f"{where}: a {type(value).__name__} cannot be stored in a checkpoint",
        mend="let its state hold numbers, strings, tensors, lists and dicts alone, or write checkpoint=off",
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count is {value!r}")
    return value


def _same(here: Iterable[Any], there: Iterable[Any], what: str) -> None:
    mine, others = set(map(str, here)), set(map(str, there))
    if mine != others:
        parts = [f"it has {', '.join(sorted(others - mine)[:5])}"] if others - mine else []
        parts += [f"it lacks {', '.join(sorted(mine - others)[:5])}"] if mine - others else []
        raise ValueError(f"its {what} are others: {'; '.join(parts)}")


class _fitting:  # noqa: N801  # read as `with _fitting():`
    """Turn what does not fit into a `CheckpointError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, KeyError | ValueError | TypeError | RuntimeError | AttributeError | IndexError):
            told = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint does not fit this training: {told}",
                mend="resume with the code and the config that it was made with, or start a new run",
            ) from error

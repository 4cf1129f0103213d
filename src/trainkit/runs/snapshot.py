"""All that a training is, as plain containers and tensors, and back: nothing but what is named here is kept."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.core.errors import CheckpointError
from trainkit.core.rng import rng_state, set_rng_state
from trainkit.runs.optimizer_state import check_same_names, copy_to_cpu, optimizer_state, restore_optimizer
from trainkit.training.state import State

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
RATE_KEYS = {"lr", "optim", "param_groups", "scheduler"}  # config keys whose change gives a new plan of the rates
ORDER_KEYS = {"batch_size", "seed", "data", "limit_batches"}  # those whose change gives an epoch other batches
CLOCKS = ("seconds", "samples_per_second")


def capture_state(state: State, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A training on a step boundary, as `torch.load(weights_only=True)` reads it back.

    Optimizers are kept by the names of their parameters and groups. The tensors are the training's own,
    not copies: they are to be written before the next step.

    Args:
        state: of the training.
        fingerprint: what its numbers depend on, for comparing only.

    Raises:
        CheckpointError: something in it cannot be stored.
    """
    optimizers = {name: optimizer_state(optimizer) for name, optimizer in state.objects.optimizers.items()}
    numerator, denominator = state.progress.loss.sums()
    return {
        "format": FORMAT,
        "model": _module_state(state.objects.model.state_dict(), "model"),
        "loss": _module_state(state.objects.loss_fn.state_dict(), "loss"),
        "optimizers": _plain(optimizers, "optimizers", without_callables=True),
        "schedulers": _plain([s.state_dict() for s in _schedulers(state)], "schedulers", without_callables=True),
        "scaler": None if state.objects.scaler is None else state.objects.scaler.state_dict(),
        "ema": None if state.objects.ema is None else _module_state(state.objects.ema.state_dict(), "ema"),
        "epoch": state.progress.epoch,
        "batch": state.progress.batch,
        "step": state.progress.step,
        "metrics": {
            "numerator": numerator,
            "denominator": denominator,
            "seen": state.progress.seen,
            "skipped": state.progress.skipped,
            "unreadable": {part: dict(known) for part, known in state.progress.unreadable.items()},
            "seconds": state.progress.elapsed,
            # of the epoch's last step, which are reported once the epoch is validated
            "rates": dict(state.progress.rates),
            "grad_norm": state.progress.grad_norm,
            "gradients": dict(state.progress.gradients),
        },
        "best": _plain(state.progress.best, "best"),
        "early_stop": {
            "epochs_since_best": state.progress.epochs_since_best,
            "reference": state.progress.patience_reference,
        },
        "rng": rng_state(),
        "fingerprint": _plain(fingerprint, "fingerprint"),
    }


def restore_state(state: State, saved: Mapping[str, Any], changed: Collection[str] = ()) -> None:
    """Put a training back to where `remember` saw it.

    Where its config has other rates now (`changed` names one of `RATES`, a longer `epochs` among the
    causes), its options are the config's, and the schedulers are stepped to where they would be if the
    run had been planned so from the start. One that goes by a plateau keeps its count. Where an epoch
    has other batches now (one of `ORDER`), one that was under way begins again.

    Raises:
        CheckpointError: what was saved is not of this training's parts.
    """
    with refuse_mismatch():
        restore_weights(state, saved, changed)
        metrics, early = saved["metrics"], saved["early_stop"]
        state.progress.epoch = saved["epoch"]
        for part, known in state.progress.unreadable.items():
            known.clear()
            known.update(metrics["unreadable"].get(part, {}))
        state.begin_epoch()
        if not ORDER_KEYS & set(changed):
            state.progress.batch, state.progress.seen, state.progress.skipped = (
                saved["batch"],
                metrics["seen"],
                metrics["skipped"],
            )
            state.progress.loss.put(metrics["numerator"], metrics["denominator"])
            state.progress.seconds = metrics["seconds"]
            state.progress.rates, state.progress.gradients = dict(metrics["rates"]), dict(metrics["gradients"])
            state.progress.grad_norm = metrics["grad_norm"]
        if "monitor" not in changed:  # the best by one metric is not the best by another
            state.progress.best = saved["best"]
            if state.progress.best is not None and not isinstance(
                state.progress.best[state.settings.monitor], int | float
            ):
                raise ValueError(
                    f"the best {state.settings.monitor} is {state.progress.best[state.settings.monitor]!r}"
                )
            state.progress.epochs_since_best, state.progress.patience_reference = (
                early["epochs_since_best"],
                early["reference"],
            )
        set_rng_state(saved["rng"])


def restore_weights(state: State, saved: Mapping[str, Any], changed: Collection[str] = ()) -> None:
    """Put back what the steps have made: weights, optimizers, schedulers, averages; not where the data stands.

    Raises:
        CheckpointError: what was saved is not of this training's parts.
    """
    with refuse_mismatch():
        check_types(saved)
        planned_anew = bool(RATE_KEYS & set(changed))
        state.progress.step = saved["step"]
        state.objects.model.load_state_dict(saved["model"])
        given = {"weight", "pos_weight"} if "loss" in changed else set()  # arguments that torch keeps as buffers
        own = {key: value for key, value in state.objects.loss_fn.state_dict().items() if key in given}
        state.objects.loss_fn.load_state_dict({key: v for key, v in saved["loss"].items() if key not in given} | own)
        optimizers, schedulers = state.objects.optimizers, _schedulers(state)
        check_same_names(optimizers, saved["optimizers"], "optimizers")
        if (state.objects.ema is None) != (saved["ema"] is None):
            raise ValueError("ema: one has it, the other has not")
        if state.objects.ema is not None:
            state.objects.ema.load_state_dict(saved["ema"])
        if state.objects.scaler is not None and saved["scaler"] is not None:
            state.objects.scaler.load_state_dict(saved["scaler"])
        for name, optimizer in optimizers.items():
            # A copy: the optimizer takes the tensors that it is given for its own.
            content = copy_to_cpu(saved["optimizers"][name])
            restore_optimizer(optimizer, content, with_options=not planned_anew)
            optimizer._opt_called = state.progress.step > 0  # type: ignore[attr-defined]  # or torch's schedulers warn
        if planned_anew:
            for scheduler in schedulers:
                _plan_anew(scheduler, state, saved, set(changed))
            return
        if len(schedulers) != len(saved["schedulers"]):
            raise ValueError(f"it has {len(saved['schedulers'])} schedulers, this training {len(schedulers)}")
        for scheduler, content in zip(schedulers, saved["schedulers"], strict=True):
            fresh = copy.copy(scheduler.__dict__)
            scheduler.load_state_dict(_like(scheduler.state_dict(), content))
            if isinstance(scheduler, ReduceLROnPlateau) and "monitor" in changed:
                scheduler.__dict__.update({key: fresh[key] for key in ("best", "num_bad_epochs", "mode", "mode_worse")})


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


# --------------------------------------------------------------------------- optimizers and schedulers


def _schedulers(state: State) -> list[Any]:
    return [*state.objects.step_schedulers, *state.objects.epoch_schedulers]


def _plan_anew(scheduler: Any, state: State, saved: Mapping[str, Any], changed: set[str]) -> None:
    """Step a new scheduler as often as a run that was planned so would have by now."""
    if isinstance(scheduler, ReduceLROnPlateau):
        place = _schedulers(state).index(scheduler)
        if place < len(saved["schedulers"]) and "num_bad_epochs" in saved["schedulers"][place]:
            counted = {"num_bad_epochs", "best", "cooldown_counter", "last_epoch"}
            counted -= {"num_bad_epochs", "best"} if "monitor" in changed else set()
            scheduler.load_state_dict({key: saved["schedulers"][place][key] for key in counted})
        if not {"lr", "param_groups"} & changed:
            groups = {name: own for kept in saved["optimizers"].values() for name, own in kept["groups"].items()}
            for group in scheduler.optimizer.param_groups:
                group["lr"] = groups[group["name"]]["lr"]
        return
    times = saved["epoch"]
    if scheduler in state.objects.step_schedulers:
        times = saved["epoch"] * state.progress.batches if ORDER_KEYS & changed else state.progress.step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps in between
        for _ in range(times):
            scheduler.step()


def _like(present: Any, saved: Any) -> Any:
    """What was saved with the types that are there: a plain dict becomes the Counter that it was."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        content = {key: _like(present.get(key), value) for key, value in saved.items()}
        if type(present) is dict:
            return content
        typed: Any = copy.copy(present)
        typed.clear()
        typed.update(content)
        return typed
    if isinstance(saved, list) and isinstance(present, set | frozenset):
        return type(present)(saved)
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        return [_like(mine, value) for mine, value in zip(present, saved, strict=True)]
    if isinstance(saved, Tensor) and isinstance(present, np.ndarray):
        return saved.numpy()
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
        return {
            _plain(key, where): _plain(item, f"{where}.{key}", without_callables=without_callables)
            for key, item in kept.items()
        }
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
    if isinstance(value, int) and abs(value) >= 2**63:
        cause = f"{where}: a whole number of {value.bit_length()} bits is too large to be stored"
        raise CheckpointError(cause, hint="let its state hold it as text")
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):  # or one derived from it, as torch's version is
            return value if type(value) is kind else kind(value)
    raise CheckpointError(
        f"{where}: a {type(value).__name__} cannot be stored in a checkpoint",
        hint="let its state hold numbers, strings, tensors, lists and dicts alone, or write checkpoint=off",
    )


def check_types(saved: Mapping[str, Any]) -> None:
    """Raise `ValueError` where what was read is not of the types that `remember` writes."""
    metrics, early, print_ = saved["metrics"], saved["early_stop"], saved["fingerprint"]
    counts = {key: saved[key] for key in ("epoch", "batch", "step")}
    counts |= {key: metrics[key] for key in ("seen", "skipped")}
    counts |= {"epochs_since_best": early["epochs_since_best"]}
    for key, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**53:
            raise ValueError(f"{key} is {value!r}, which is no count")
    wrong = {
        "seconds": not (isinstance(metrics["seconds"], float) and 0 <= metrics["seconds"] < math.inf),
        "reference": not isinstance(early["reference"], int | float | None),
        "best": not (saved["best"] is None or (isinstance(saved["best"], dict) and _counts(saved["best"]))),
        "grad_norm": not isinstance(metrics["grad_norm"], Tensor | None),
        "fingerprint": not isinstance(print_, dict),
    }
    wrong |= {key: not isinstance(metrics[key], dict) for key in ("rates", "gradients", "unreadable")}
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{key} is not of its type")
    if "epochs" in print_ and saved["epoch"] > print_["epochs"]:
        raise ValueError(f"it has done {saved['epoch']} of {print_['epochs']} epochs")


def _counts(best: Mapping[str, Any]) -> bool:
    return all(isinstance(key, str) for key in best) and type(best.get("epoch")) is int


@contextmanager
def refuse_mismatch() -> Iterator[None]:
    """Turn what does not fit into a `CheckpointError`."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint does not fit this training: {told}",
            hint="resume with the code and the config that it was made with, or start a new run",
        ) from error

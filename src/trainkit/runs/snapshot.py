"""Snapshots: the whole state of a training as plain containers and tensors, and its restore."""

from __future__ import annotations

import hashlib
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
from trainkit.core.pytree import copy_to_cpu
from trainkit.core.rng import rng_state, set_rng_state
from trainkit.training.interruption import share_unreadable
from trainkit.training.metrics import CLOCKS
from trainkit.training.progress import Progress
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
MODULE_KEYS = ("model", "loss", "ema")
RATE_KEYS = {"lr", "optim", "param_groups", "scheduler"}  # config keys that plan the learning rates
# Config keys that decide the batches of an epoch.
ORDER_KEYS = {"batch_size", "seed", "data", "limit_batches", "steps_per_epoch"}
LOSS_ARGUMENTS = {"weight", "pos_weight"}  # arguments that torch stores as buffers
# Entries of a plateau scheduler's state: its counts, and those that depend on the monitored metric.
PLATEAU_COUNTS = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch"}
PLATEAU_MONITOR = {"best", "num_bad_epochs", "mode", "mode_worse"}

PARTS = "numbers, strings, tensors, lists and dicts"
HOOK_HINT = f"let state_dict return {PARTS}, or write checkpoint=off"
STEP_HINT = f"return {PARTS} from state_dict, or write checkpoint=off"
METRIC_HINT = f"define state_dict and load_state_dict with {PARTS}, or use the metric with on: [val]"


def capture_state(state: State, fingerprint: Mapping[str, Any], *, with_hooks: bool = True) -> dict[str, Any]:
    """Return the state of a training between two steps, readable by `torch.load(weights_only=True)`.

    The tensors are not copies. Write them before the next step. With several ranks, it is the state of this rank.

    Args:
        state: the state of the training.
        fingerprint: what the results depend on; used for comparisons only.
        with_hooks: include the states of custom hooks.

    Raises:
        CheckpointError: the state has a value that cannot be stored.
    """
    share_unreadable(state)
    captured = state.objects.state_dict()
    metrics = _strict(captured.pop("train_metrics"), "metrics", METRIC_HINT)
    steps = {key: _strict(own, f"{key}.state_dict", STEP_HINT) for key, own in captured.pop("steps").items()}
    objects = {
        key: _module_state(value, key) if key in MODULE_KEYS else _plain(value, key, without_callables=True)
        for key, value in captured.items()
    }
    hooks = {name: hook.state_dict() for name, hook in state.objects.hooks.items()} if with_hooks else {}
    more = {"train_metrics": metrics, "steps": steps, "hooks": _strict(hooks, "hooks", HOOK_HINT)}
    if state.objects.stream is not None:
        more["stream"] = _plain(state.objects.stream.state_dict(state.progress.epoch, state.progress.batch), "stream")
    progress = {key: _plain(value, key) for key, value in state.progress.state_dict().items()}
    rest = {"rng": rng_state(), "fingerprint": _plain(fingerprint, "fingerprint")}
    return {"format": FORMAT, **objects, **progress, **more, **rest}


def restore_state(state: State, saved: Mapping[str, Any], changed: Collection[str] = ()) -> None:
    """Restore what `capture_state` returned.

    If the planned learning rates changed (`RATE_KEYS`; a longer run changes `scheduler`), the options come from
    the config and the schedulers are fast-forwarded; a plateau scheduler keeps its counts. If the batches changed
    (`ORDER_KEYS`), the epoch restarts. If the monitor changed, there is no best epoch yet.

    Args:
        state: the state of a new session.
        saved: the captured state.
        changed: top-level config keys whose values differ from the saved run's.

    Raises:
        CheckpointError: the captured state does not fit this training.
    """
    with refuse_mismatch():
        restore_weights(state, saved, changed)
        state.progress.load_state_dict(_without_changed(state, saved, changed))
        # The metrics cover the samples of the epoch's loss, so a rollback of the weights leaves them as they are.
        state.objects.train_metrics.load_state_dict(saved.get("train_metrics", {}), in_epoch=saved["batch"] > 0)
        restart = bool(ORDER_KEYS & set(changed))
        if restart:
            state.begin_epoch()
        if state.objects.stream is not None and "stream" in saved:
            place = state.progress.epoch, state.progress.batch
            state.objects.stream.load_state_dict(saved["stream"], *place, restart=restart)
        state.set_frozen()
        best, monitor = state.progress.best, state.settings.monitor
        if best is not None and not isinstance(best[monitor], int | float):
            raise ValueError(f"the best {monitor} is {best[monitor]!r}, expected a number")
        if saved["rng"] is not None:
            set_rng_state(saved["rng"])


def restore_weights(state: State, saved: Mapping[str, Any], changed: Collection[str] = ()) -> None:
    """Restore the objects and the step count, but not the position in the data.

    Args:
        state: the state of the training.
        saved: the captured state.
        changed: see `restore_state`.

    Raises:
        CheckpointError: the captured state does not fit this training.
    """
    with refuse_mismatch():
        check_types(saved)
        new_rates = bool(RATE_KEYS & set(changed))
        state.objects.load_state_dict(_without_changed(state, saved, changed), keep_rates=new_rates)
        state.progress.step = saved["step"]
        for optimizer in state.objects.optimizers.values():
            optimizer._opt_called = state.progress.step > 0  # type: ignore[attr-defined]  # else torch's schedulers warn
        if new_rates:
            for number, scheduler in enumerate(state.objects.schedulers):
                if isinstance(scheduler, ReduceLROnPlateau):
                    _restore_plateau(scheduler, number, saved, set(changed))
                else:
                    _fast_forward(state, scheduler, saved, set(changed))


def restore_hooks(state: State, saved: Mapping[str, Any]) -> None:
    """Restore the states of the custom hooks, after their `on_start`. A hook without a saved state is left as it is."""
    for name, content in saved.get("hooks", {}).items():
        if name in state.objects.hooks:
            state.objects.hooks[name].load_state_dict(copy_to_cpu(content))


def _without_changed(state: State, saved: Mapping[str, Any], changed: Collection[str]) -> dict[str, Any]:
    """Return the captured state without the values that a changed config key decides; the present values stay."""
    adapted = dict(saved)
    if "loss" in changed:
        present = {key: value for key, value in state.objects.loss_fn.state_dict().items() if key in LOSS_ARGUMENTS}
        adapted["loss"] = {key: v for key, v in saved["loss"].items() if key not in LOSS_ARGUMENTS} | present
    if "monitor" in changed:  # the best epoch by one metric is not the best by another
        adapted["best"], adapted["early_stop"] = None, {"epochs_since_best": 0, "reference": None}
        if len(state.objects.schedulers) == len(saved["schedulers"]):
            adapted["schedulers"] = [
                {**content, **{key: getattr(scheduler, key) for key in PLATEAU_MONITOR}}
                if isinstance(scheduler, ReduceLROnPlateau)
                else content
                for scheduler, content in zip(state.objects.schedulers, saved["schedulers"], strict=True)
            ]
    return adapted


def _fast_forward(state: State, scheduler: Any, saved: Mapping[str, Any], changed: set[str]) -> None:
    """Step a new scheduler as often as it would have stepped by now."""
    steps = saved["epoch"]
    if scheduler in state.objects.step_schedulers:
        steps = saved["epoch"] * state.progress.batches if ORDER_KEYS & changed else state.progress.step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects optimizer steps in between
        for _ in range(steps):
            scheduler.step()


def _restore_plateau(scheduler: ReduceLROnPlateau, number: int, saved: Mapping[str, Any], changed: set[str]) -> None:
    """Restore the counts of a plateau scheduler, and the learning rates that it has lowered so far."""
    content = saved["schedulers"][number] if number < len(saved["schedulers"]) else {}
    if "num_bad_epochs" in content:
        restored = PLATEAU_COUNTS - PLATEAU_MONITOR if "monitor" in changed else PLATEAU_COUNTS
        scheduler.load_state_dict({key: content[key] for key in restored})
    if not {"lr", "param_groups"} & changed:
        optimizers = saved["optimizers"].values()
        groups = {name: group for optimizer in optimizers for name, group in optimizer["groups"].items()}
        for group in scheduler.optimizer.param_groups:
            group["lr"] = groups[group["name"]]["lr"]


def digest(saved: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a captured state without its fingerprint, history and clocks, in hexadecimal."""
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
        elif isinstance(value, Tensor) and value.layout != torch.strided:
            sparse = value.detach().to_sparse().coalesce()
            whole.update(f"{value.layout}{tuple(value.shape)}".encode())
            add([sparse.indices(), sparse.values()])
        elif isinstance(value, Tensor):
            real = torch.view_as_real(value) if value.is_complex() else value
            whole.update(f"{value.dtype}{tuple(value.shape)}".encode())
            whole.update(real.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            whole.update(f"{type(value).__name__} {value!r};".encode())

    add({key: value for key, value in saved.items() if key not in ("fingerprint", "history")})
    return whole.hexdigest()


# ------------------------------------------------------------------------------ plain containers, checks


def _module_state(content: Mapping[str, Any] | None, path: str) -> dict[str, Any] | None:
    """Return a module's state with its metadata, in which torch stores the versions of layers."""
    if content is None:
        return None
    plain = OrderedDict(_plain(dict(content), path))
    plain._metadata = getattr(content, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return plain


def _plain(value: Any, path: str, *, without_callables: bool = False) -> Any:
    """Return a value with Python's containers and numbers instead of those of other libraries.

    Raises:
        CheckpointError: only pickle could store the value.
    """
    if isinstance(value, Mapping):
        return {
            _plain(key, path): _plain(item, f"{path}.{key}", without_callables=without_callables)
            for key, item in value.items()
            if not (without_callables and callable(item))
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item, path, without_callables=without_callables) for item in value]
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
        cause = f"{path}: an integer of {value.bit_length()} bits cannot be stored, expected at most 63"
        raise CheckpointError(cause, hint="store the integer as a string in state_dict")
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)  # a subclass, such as torch's version
    raise CheckpointError(
        f"{path}: a {type(value).__name__} cannot be stored in a checkpoint",
        hint="store only numbers, strings, tensors, lists and dicts in state_dict, or write checkpoint=off",
    )


def _strict(value: Any, path: str, hint: str) -> Any:
    """Return a value of numbers, strings, tensors, lists, tuples and dicts, which is restored as it is.

    Raises:
        CheckpointError: the value has another type, such as a set, which would be restored as a list.
    """
    if isinstance(value, Mapping):
        return {_strict(key, path, hint): _strict(item, f"{path}.{key}", hint) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_strict(item, path, hint) for item in value)
    if value is None or isinstance(value, Tensor | bool | int | float | complex | str | bytes):
        return _plain(value, path)
    cause = f"{path}: a {type(value).__name__} cannot be stored in a checkpoint"
    raise CheckpointError(cause, hint=hint)


def check_types(saved: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a value has not the type that `capture_state` gives it."""
    Progress.check_state_dict(saved)
    if not isinstance(saved["fingerprint"], dict):
        raise ValueError("fingerprint has the wrong type")


@contextmanager
def refuse_mismatch() -> Iterator[None]:
    """Raise a `CheckpointError` for any error that a misfit of checkpoint and training causes in the block."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint does not fit this training: {reason}",
            hint="resume with the code and the config of the saved run, or start a new run",
        ) from error

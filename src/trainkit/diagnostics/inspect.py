"""One training step taken apart: what backward, a second backward, the update and zero_grad each do."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.build.session import Session
from trainkit.core.pytree import batch_size_of, map_tensors
from trainkit.training.loop import train_step
from trainkit.training.metrics import scalar_or_norm
from trainkit.training.oom import run_with_oom_split
from trainkit.training.state import State
from trainkit.training.step import loss_in_parts

STEP = 1e-5  # of the finite difference, relative to the parameter where that is larger than 1


def inspect_step(session: Session) -> dict[str, Any]:
    """Take the first step of a training apart; the training is of no use afterwards.

    Returns:
        `loss` and `samples` of the batch, and under `parameters` a row each: `name`, `shape`, `count`,
        `group`, `weight`, `grad_before`, `grad`, `grad_twice` (after a second backward of the same
        loss), `grad_after_zero`, `update`, `relative_update` (its norm over the weight's),
        `weight_after`, `finite_difference`. A single element is given by its value, more by their
        norm, and no gradient by None. The finite difference, central and in float64, is for
        trainable single elements only.
    """
    state = session.state
    inputs, targets = next(session.train.batches(0))
    state.objects.trained.train()
    state.settings = replace(state.settings, check_steps=False)  # a NaN is shown like any other number
    rows = {row["name"]: {key: row[key] for key in ("name", "shape", "count", "group")} for row in session.params}
    named = {name: session.named[name] for name in rows}

    scale = 1.0 if state.objects.scaler is None else state.objects.scaler.get_scale()  # of the loss, in fp16

    def note(key: str) -> None:
        for name, row in rows.items():
            number = scalar_or_norm(named[name].grad)
            row[key] = None if number is None else number / scale

    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    state.objects.optimizer.zero_grad()
    note("grad_before")
    for key in ("grad", "grad_twice"):
        with _same_draws(state.objects.device):
            loss = run_with_oom_split(loss_in_parts, state, inputs, targets, [])
        note(key)
    state.objects.optimizer.zero_grad()
    note("grad_after_zero")
    trainable = [name for name, param in named.items() if param.requires_grad]
    differences = finite_differences(state, inputs, targets, loss.item(), trainable)
    run_with_oom_split(train_step, state, inputs, targets, [])
    for name, row in rows.items():
        change = named[name].detach() - before[name]
        row["weight"], row["weight_after"] = scalar_or_norm(before[name]), scalar_or_norm(named[name].detach())
        row["update"] = scalar_or_norm(change)
        size = before[name].norm().item()
        row["relative_update"] = change.norm().item() / size if size else None
        row["finite_difference"] = differences.get(name)
    return {"loss": loss.item(), "samples": batch_size_of(inputs), "parameters": list(rows.values())}


def finite_differences(state: State, inputs: Any, targets: Any, at_start: float, names: list[str]) -> dict[str, float]:
    """(loss(p + h) - loss(p - h)) / 2h in float64, for each parameter among `names` that is one number.

    None of a model that cannot be copied, does not compute in float64, or gives another loss there (as
    one does that draws at random in another way).
    """
    where = torch.device("cpu") if state.objects.device.type == "mps" else state.objects.device  # which has no float64
    found: dict[str, float] = {}
    try:
        twin = copy.deepcopy(state.objects.trained).to(where).double()
        model, loss_fn = twin["model"], twin["loss"]
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= {f"loss.{name}": p for name, p in loss_fn.named_parameters(remove_duplicate=False)}
        objects = replace(state.objects, model=model, loss_fn=loss_fn)
        twin_state = replace(state, objects=objects)
        exact = [map_tensors(part, lambda t: _double(t.to(where))) for part in (inputs, targets)]

        @torch.no_grad()
        def value(param: nn.Parameter, at: Tensor) -> float:
            with _same_draws(where):
                param.copy_(at)
                loss = loss_in_parts(twin_state, *exact)
            if loss.dtype != torch.float64:
                raise TypeError("not in float64")
            return loss.item()

        for name in names:
            param = named[name]
            if param.numel() != 1 or param.is_complex():
                continue
            start = param.detach().clone()
            if not math.isclose(value(param, start), at_start, rel_tol=1e-3, abs_tol=1e-6):
                return {}
            h = STEP * max(1.0, abs(start.item()))
            found[name] = (value(param, start + h) - value(param, start - h)) / (2 * h)
            value(param, start)
    except Exception:  # whatever a model that is written for float32 raises
        return {}
    return found


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Let dropout draw here what it will draw again afterwards."""
    kind = "cuda" if device.type == "cpu" else device.type  # of which none are listed then
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield

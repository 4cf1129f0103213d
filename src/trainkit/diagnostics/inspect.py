"""One training step in detail: the effects of backward, a second backward, zero_grad and the update."""

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
from trainkit.training.custom_training import gradient_of_batch
from trainkit.training.loop import train_step
from trainkit.training.metrics import scalar_or_norm
from trainkit.training.oom import run_with_oom_split
from trainkit.training.state import State

REL_STEP = 1e-5  # of the finite difference, relative to the parameter; absolute for parameters below 1


def inspect_step(session: Session) -> dict[str, Any]:
    """Do the first step of a training and return its intermediate values. The session is useless afterwards.

    Returns:
        `loss` and `samples` of the batch, and `parameters`: a row for each parameter with `name`, `shape`,
        `count`, `group`, `frozen_epochs` (before it is trained), `weight`, `grad_before`, `grad` (after backward),
        `grad_twice` (after a second backward of the same loss), `grad_after_zero`, `update`, `relative_update`
        (norm of the update over norm of the weight), `weight_after`, `finite_difference` (see `finite_differences`).
        A tensor of one element is given by its value, other tensors by their norm, and a missing gradient by None.
    """
    state = session.state
    objects = state.objects
    inputs, targets = next(session.train.batches(0))
    objects.trained.train()
    state.settings = replace(state.settings, check_steps=False)  # NaN is shown like any other number
    rows = {row["name"]: {key: row[key] for key in ("name", "shape", "count", "group")} for row in session.params}
    for row in session.params:
        rows[row["name"]]["frozen_epochs"] = row["options"].get("freeze", 0)
    params = {name: session.named[name] for name in rows}
    loss_scale = 1.0 if objects.scaler is None else objects.scaler.get_scale()

    def record_gradients(key: str) -> None:
        for name, row in rows.items():
            value = scalar_or_norm(params[name].grad)
            row[key] = None if value is None else value / loss_scale

    before = {name: param.detach().clone() for name, param in params.items()}
    objects.optimizer.zero_grad()
    record_gradients("grad_before")
    for key in ("grad", "grad_twice"):
        with _preserve_torch_rng(objects.device):
            loss = run_with_oom_split(gradient_of_batch, state, inputs, targets, [])
        record_gradients(key)
    objects.optimizer.zero_grad()
    record_gradients("grad_after_zero")
    trainable = [name for name, param in params.items() if param.requires_grad]
    differences = finite_differences(state, inputs, targets, loss.item(), trainable)
    run_with_oom_split(train_step, state, inputs, targets, [])
    for name, row in rows.items():
        after = params[name].detach()
        row |= _update_values(before[name], after) | {"finite_difference": differences.get(name)}
    return {"loss": loss.item(), "samples": batch_size_of(inputs), "parameters": list(rows.values())}


def _update_values(before: Tensor, after: Tensor) -> dict[str, float | None]:
    update, norm = after - before, before.norm().item()
    return {
        "weight": scalar_or_norm(before),
        "weight_after": scalar_or_norm(after),
        "update": scalar_or_norm(update),
        "relative_update": update.norm().item() / norm if norm else None,
    }


def finite_differences(
    state: State, inputs: Any, targets: Any, expected_loss: float, names: list[str]
) -> dict[str, float]:
    """Return (loss(p + h) - loss(p - h)) / 2h in float64 for each parameter in `names` that has one element.

    Returns nothing if the model cannot be copied, does not compute in float64, or does not reproduce
    `expected_loss` (for example because it draws other random numbers in float64).
    """
    # MPS does not support float64.
    device = torch.device("cpu") if state.objects.device.type == "mps" else state.objects.device
    differences: dict[str, float] = {}
    try:
        copied = copy.deepcopy(state.objects.trained).to(device).double()
        model, loss_fn = copied["model"], copied["loss"]
        params = dict(model.named_parameters(remove_duplicate=False))
        params |= {f"loss.{name}": p for name, p in loss_fn.named_parameters(remove_duplicate=False)}
        float64_state = replace(state, objects=replace(state.objects, model=model, loss_fn=loss_fn))
        batch = [map_tensors(part, lambda t: _to_float64(t.to(device))) for part in (inputs, targets)]

        @torch.no_grad()
        def loss_at(param: nn.Parameter, value: Tensor) -> float:
            with _preserve_torch_rng(device):
                param.copy_(value)
                loss = gradient_of_batch(float64_state, *batch)
            if loss.dtype != torch.float64:
                raise TypeError("the loss is not float64")
            return loss.item()

        for name in names:
            param = params[name]
            if param.numel() != 1 or param.is_complex():
                continue
            value = param.detach().clone()
            if not math.isclose(loss_at(param, value), expected_loss, rel_tol=1e-3, abs_tol=1e-6):
                return {}
            h = REL_STEP * max(1.0, abs(value.item()))
            differences[name] = (loss_at(param, value + h) - loss_at(param, value - h)) / (2 * h)
            param.data.copy_(value)
    except Exception:  # a model written for float32 may raise anything
        return {}
    return differences


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def _preserve_torch_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's RNG states after the block, so that dropout draws the same numbers again."""
    # fork_rng needs a device type even if no device is listed.
    device_type = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device_type):
        yield

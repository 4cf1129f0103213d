"""Non-finite losses and gradients: find them, and skip the batch or end the training."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit.core.errors import NonFiniteError, Problem
from trainkit.core.shards import local_part
from trainkit.data.batch_order import NO_SAMPLES_TEXT
from trainkit.data.loaders import Loader
from trainkit.optim.chained import ChainedOptimizer
from trainkit.training.hooks import call_hooks
from trainkit.training.last_step import record_last_step
from trainkit.training.metrics import Metrics
from trainkit.training.state import State

MAX_SKIPPED = 10  # batches of an epoch that on_nonfinite=skip may skip, or 1 in 100 of the batches if that is more
MAX_ROLLBACKS = 3  # rollbacks in an epoch
MIN_SCALE = 2.0**-10  # of the loss in fp16; the scale starts at 2**16 and each overflow halves it


# ----------------------------------------------------------------------------------- in a step


def check_step(state: State, loss: Tensor, weight: Tensor | float, optimizer: Optimizer | ChainedOptimizer) -> None:
    """Raise `NonFiniteError` if the loss or the optimizer's gradient is not finite; the error names the param groups.

    With fp16 the scaler handles a gradient that overflows.
    """
    value, objects = loss.item(), state.objects
    if not math.isfinite(value) and weight == 0:  # a mean over nothing, which adds nothing
        value = 0.0
    if math.isfinite(value) and (
        objects.scaler is not None
        or objects.true_everywhere(
            all_finite([param.grad for group in optimizer.param_groups for param in group["params"]], objects.device)
        )
    ):
        return
    groups = [
        str(group.get("name", number))
        for number, group in enumerate(optimizer.param_groups)
        if not objects.true_everywhere(_is_finite(group["params"]))
    ]
    in_groups = f"in param group{'s' * (len(groups) != 1)} {', '.join(groups)}"
    if not math.isfinite(value):
        gradient = f"the gradient is not finite {in_groups}" if groups else "the gradient is finite"
        cause = f"the loss is {value}, {gradient}"
    elif groups:
        cause = f"the gradient is not finite {in_groups}"
    else:
        return
    raise NonFiniteError(
        f"step {state.progress.step + 1}: {cause}",
        hint="lower lr or set clip_norm=1; if the first step fails, look for NaN in the data and the model",
    )


def all_finite(gradients: Iterable[Tensor | None], device: torch.device) -> bool:
    """Return whether every element of the gradients on a device is finite; this synchronizes the device once.

    The kernel is the one with which GradScaler divides by the scale, here 1. It takes half the time of the norms.
    """
    present = [local_part(gradient) for gradient in gradients if gradient is not None]
    if not present:
        return True
    found, scale = _found_and_scale(device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(present, found, scale)
        is_finite = not found.item()
    except RuntimeError:  # complex or sparse gradients, several devices, or gradients with a graph
        is_finite = all(bool(gradient_values(gradient).isfinite().all()) for gradient in present)
    if not is_finite:
        found.zero_()  # for the next step
    return is_finite


@functools.cache
def _found_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 0 and 1 on a device, made once: for a small model, to make two tensors takes 2% of a step."""
    return torch.zeros(1, device=device), torch.ones(1, device=device)


def _is_finite(params: Iterable[Tensor]) -> bool:
    gradients = [gradient_values(local_part(param.grad)) for param in params if param.grad is not None]
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def gradient_values(gradient: Tensor) -> Tensor:
    """Return the gradient, or the stored values of a sparse gradient."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def skip_batch(state: State, loader: Loader, inputs: Any, error: NonFiniteError, hooks: Sequence[Any]) -> None:
    """Skip a batch with a non-finite loss or gradient, or raise an error that names its samples.

    The RNG states stay advanced. With `on_nonfinite` rollback, a hook restores older weights.
    """
    progress, on_nonfinite = state.progress, state.settings.on_nonfinite
    with state.objects.ranks.together():
        share = loader.describe(progress.epoch, progress.batch, inputs)
    samples = "; ".join(text for text in state.objects.ranks.gather(share) if text != NO_SAMPLES_TEXT)
    batch = f"batch {progress.batch + 1} of epoch {progress.epoch + 1}, {samples}"
    located = NonFiniteError(*(Problem(f"{problem.cause} ({batch})", problem.hint) for problem in error.problems))
    limit = MAX_ROLLBACKS if on_nonfinite == "rollback" else max(MAX_SKIPPED, progress.batches // 100)
    if on_nonfinite == "stop" or progress.skipped >= limit:
        raise located from error
    progress.skipped += 1
    state.objects.optimizer.zero_grad()
    if state.in_last_batch:
        record_last_step(state, None)
    call_hooks(hooks, "on_nonfinite", state, located)


# ------------------------------------------------------------------------------- after an epoch


def check_finite(state: State, metrics: Metrics) -> None:
    """Raise `NonFiniteError` if a loss or the gradient norm of an epoch is not finite."""
    if metrics.get("train/scale", 1.0) < MIN_SCALE:
        raise _scale_error(metrics["train/scale"])
    name = nonfinite_metric(state, metrics)
    if name is not None:
        raise NonFiniteError(
            f"{name} is {metrics[name]} in epoch {metrics['epoch']}",
            hint="lower lr or set clip_norm=1; if epoch 1 fails, look for NaN in the data",
        )


def nonfinite_metric(state: State, metrics: Mapping[str, Any]) -> str | None:
    """Return the name of the first non-finite loss; include `grad_norm` if the steps are not checked."""
    checked = state.settings.check_steps or state.objects.scaler is not None
    names = ("train/loss", "val/loss") if checked else ("train/loss", "grad_norm", "val/loss")
    values = {name: metrics.get(name) for name in names}
    return next((name for name, value in values.items() if value is not None and not math.isfinite(value)), None)


def check_scale(state: State) -> None:
    """Raise `NonFiniteError` if every step of a training in fp16 has overflowed."""
    scaler, step = state.objects.scaler, state.progress.step
    if scaler is not None and step >= 10 and scaler.get_scale() == 2.0 ** (16 - step):
        raise _scale_error(scaler.get_scale())


def _scale_error(scale: float) -> NonFiniteError:
    return NonFiniteError(
        f"the gradient overflowed in fp16 at every scale of the loss that was tried, down to {scale:.1e}",
        hint="write precision=bf16, or look for NaN in the gradient with precision=fp32",
    )

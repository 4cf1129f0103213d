"""What is reported of the last step of an epoch: learning rates, gradient norm, watched parameters."""

from __future__ import annotations

from torch import Tensor

from trainkit.training.metrics import Metrics, scalar_or_norm
from trainkit.training.state import State


def record_last_step(state: State, grad_norm: Tensor | None) -> None:
    """Keep the learning rates and gradients of an epoch's last step, before the optimizer changes them."""
    progress, groups = state.progress, enumerate(state.objects.optimizer.param_groups)
    rates = {f"lr/{group.get('name', number)}": group.get("lr") for number, group in groups}
    progress.rates = {name: float(rate) for name, rate in rates.items() if rate is not None}
    progress.grad_norm = grad_norm
    progress.gradients = {f"grad/{name}": scalar_or_norm(param.grad) for name, param in state.objects.watch.items()}


def last_step_metrics(state: State) -> Metrics:
    """Return the learning rates, the gradient norm, and the watched parameters and their gradients."""
    progress = state.progress
    params = {f"param/{name}": scalar_or_norm(param) for name, param in state.objects.watch.items()}
    return {**progress.rates, "grad_norm": scalar_or_norm(progress.grad_norm), **params, **progress.gradients}

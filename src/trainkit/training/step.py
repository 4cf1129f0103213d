"""What a step needs beyond its five lines: batches in parts, closures, the gradient's bounds, too little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainkit.core.device import empty_cache, is_out_of_memory, peak_memory
from trainkit.core.errors import NonFiniteError, OutOfMemoryError
from trainkit.core.pytree import batch_size_of, map_tensors, shape_of
from trainkit.data.prepare import Batch
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import denominator, is_sum, knows_sum, summing
from trainkit.training.state import Metrics, Phase, State

Result = TypeVar("Result")


def train_step_in_parts(state: State, inputs: Any, targets: Any) -> None:
    """The same update in micro batches, or where the optimizer evaluates the loss itself.

    Each micro batch's loss counts by its share of the whole step's denominator, so the gradient is
    that of the whole batch. Of an optimizer's several evaluations the first is the epoch's loss.
    """
    first: list[Tensor] = []
    weight = denominator(state.objects.loss_fn, targets, batch_size_of(inputs))

    def closure() -> Tensor:
        state.objects.optimizer.zero_grad()
        total = loss_in_parts(state, inputs, targets)
        before_update(state, total, weight, first=not first)
        first.append(total)
        return total

    if state.objects.needs_closure:
        state.phase = Phase.UPDATING
        state.objects.optimizer.step(closure)  # type: ignore[arg-type,call-arg]  # torch says it returns a float
    else:
        closure()
        update(state)
    state.progress.loss.update(first[0], weight=weight)


def loss_in_parts(state: State, inputs: Any, targets: Any) -> Tensor:
    """The loss of a batch, one micro batch at a time; where gradients are on, each adds its own to what is there."""
    samples = batch_size_of(inputs)
    weight = denominator(state.objects.loss_fn, targets, samples)
    total = torch.zeros((), device=state.objects.device)
    for part, part_targets in micro_batches(inputs, targets, state.progress.micro_batch):
        whole = batch_size_of(part) == samples
        loss = loss_of_part(state, part, part_targets, None if whole else weight)
        if loss is not None:
            if torch.is_grad_enabled():
                (loss if state.objects.scaler is None else state.objects.scaler.scale(loss)).backward()
            total = total + loss.detach()
    return total


def loss_of_part(state: State, inputs: Any, targets: Any, weight: Tensor | int | None) -> Tensor | None:
    """What a part of a batch adds to the loss of the whole, whose denominator is `weight`; None: nothing counts.

    Without a weight the part is the whole.
    """
    if weight is None:
        with state.objects.autocast:
            whole: Tensor = state.loss_fn(state.model(inputs), targets)
        return whole
    own = denominator(state.objects.loss_fn, targets, batch_size_of(inputs))
    # Its mean would be 0 / 0. Only a loss of the user's own makes the device wait for this.
    if not knows_sum(state.objects.loss_fn) and not is_sum(state.objects.loss_fn) and own == 0:
        return None
    with summing(state.objects.loss_fn) as summed, state.objects.autocast:
        loss: Tensor = state.loss_fn(state.model(inputs), targets)
    if is_sum(state.objects.loss_fn):
        return loss
    if not summed:
        loss = loss * own
    return loss / (torch.where(weight == 0, 1, weight) if isinstance(weight, Tensor) else weight)


def micro_batches(inputs: Any, targets: Any, size: int | None) -> Iterator[Batch]:
    """A batch in parts of at most `size` samples, in order."""
    samples = batch_size_of(inputs)
    for start in range(0, samples, size or samples):
        part = slice(start, start + (size or samples))
        yield map_tensors(inputs, lambda t, p=part: t[p]), map_tensors(targets, lambda t, p=part: t[p])  # type: ignore[misc]


# ------------------------------------------------------------------- between backward and the update


def before_update(state: State, loss: Tensor, weight: Tensor | int, *, first: bool = True) -> None:
    """Look at the loss, a mean over `weight`, and at the gradient, and bound it; from here on the weights may change.

    Of an optimizer's several evaluations only the `first` is looked at: the others are its own search.

    Raises:
        NonFiniteError: one of them is NaN or infinite (where each step is looked at).
    """
    if first and state.settings.check_steps:
        check_step(state, loss, weight)
    if state.objects.scaler is not None and has_gradients(state):
        state.objects.scaler.unscale_(state.objects.optimizer)  # type: ignore[arg-type]  # several are one: all step, or none
    if first and state.progress.batch + 1 >= state.progress.batches:
        record_last_step(state, gradient_norm(state))
    clip_gradients(state)
    prepare_fused(state)
    state.phase = Phase.UPDATING


def update(state: State) -> None:
    """Step the optimizer; with fp16 nothing changes where scaled gradients overflowed, and the scale is halved.

    On an accelerator one fused optimizer decides that there; any other makes the device wait.
    """
    if state.objects.scaler is None or not has_gradients(state):
        state.objects.optimizer.step()
        return
    state.objects.scaler.step(state.objects.optimizer)  # type: ignore[arg-type]
    state.objects.scaler.update()
    for optimizer in state.objects.optimizers.values():
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers miss a step that overflowed


def has_gradients(state: State) -> bool:
    """Whether any parameter has one."""
    return any(param.grad is not None for param in parameters(state))


def prepare_fused(state: State) -> None:
    """Give fused optimizers what they take for granted, and torch's others do not.

    A gradient lies in memory as its parameter does (autograd sees to that, hooks of one's own may not); the
    momentum of SGD is there before the first step, where torch begins with what memory holds if that
    step overflows in fp16; 0 is what it would be, without dampening. Sparse gradients are not for them.
    """
    for optimizer in state.objects.optimizers.values():
        for group in optimizer.param_groups:
            if not group.get("fused"):
                continue
            momentum = bool(group.get("momentum")) and isinstance(optimizer, torch.optim.SGD)
            momentum &= not group.get("dampening")
            for param in group["params"]:
                gradient = param.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    group["fused"], optimizer._step_supports_amp_scaling = None, False  # type: ignore[attr-defined]
                    break
                if gradient.stride() != param.stride() and not _lies_alike(gradient, param):
                    param.grad = torch.empty_like(param).copy_(gradient)
                if momentum and optimizer.state[param].get("momentum_buffer") is None:
                    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def _lies_alike(one: Tensor, other: Tensor) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def gradient_norm(state: State) -> Tensor:
    """The norm of the gradient over the parameters of all groups, a scalar on the device."""
    return nn.utils.get_total_norm([elements(p.grad) for p in parameters(state) if p.grad is not None])


def elements(gradient: Tensor) -> Tensor:
    """The gradient, or of a sparse one, of which torch knows less, the elements that there are."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def parameters(state: State) -> Iterator[Tensor]:
    """All that the optimizer updates."""
    return (param for group in state.objects.optimizer.param_groups for param in group["params"])


def check_step(state: State, loss: Tensor, weight: Tensor | int) -> None:
    """Raise `NonFiniteError` where the loss or the gradient is NaN or infinite, with the groups it is in.

    A gradient that overflows in fp16 is the scaler's affair.
    """
    value = loss.item()
    if not math.isfinite(value) and weight == 0:  # a mean over nothing, which adds nothing
        value = 0.0
    if math.isfinite(value) and state.objects.scaler is not None:
        return
    if math.isfinite(value) and all_finite(p.grad for p in parameters(state)):
        return
    groups = [
        str(group.get("name", number))
        for number, group in enumerate(state.objects.optimizer.param_groups)
        if any(p.grad is not None and not bool(elements(p.grad).isfinite().all()) for p in group["params"])
    ]
    if math.isfinite(value) and not groups:
        return
    what = f"the loss is {value}" if not math.isfinite(value) else "the gradient is not finite"
    where = f"in param group{'s' * (len(groups) != 1)} {', '.join(groups)}"
    if not math.isfinite(value):
        where = f"the gradient is not finite {where}" if groups else "the gradient is finite"
    raise NonFiniteError(
        f"step {state.progress.step + 1}: {what}{', ' if not math.isfinite(value) else ' '}{where}",
        hint="lower lr, or set clip_norm=1; if the first step has it already, look for NaN in the data and the model",
    )


def all_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Whether each element of the gradients is finite; the device is waited for once.

    The pass with which GradScaler unscales by 1 / scale, here by 1: half of what norms cost.
    """
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return True
    found, scale = torch.zeros(1, device=there[0].device), torch.ones(1, device=there[0].device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(there, found, scale)
        return not found.item()
    except RuntimeError:  # complex or sparse, on several devices, or part of a graph
        return all(bool(elements(g).isfinite().all()) for g in there)


def clip_gradients(state: State) -> None:
    """Bound the gradient over the parameters of all groups: each element, then the whole's norm."""
    if state.settings.clip_value is not None:
        nn.utils.clip_grad_value_(parameters(state), state.settings.clip_value)
    if state.settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters(state), state.settings.clip_norm)


# --------------------------------------------------------------------------- where memory runs out


def run_with_oom_split(
    work: Callable[[State, Any, Any], Result], state: State, inputs: Any, targets: Any, hooks: Sequence[Any]
) -> Result:
    """Do the work on a batch; where memory runs out, halve the micro batch and do it again.

    Raises:
        OutOfMemoryError: with `on_oom` stop, where one sample is too much, and where the weights may
            have begun to change.
        NonFiniteError: from the work; what the batch did to batch statistics is undone.
    """
    kept = [(tensor, tensor.clone()) for tensor in state.objects.statistics]
    while True:
        try:
            return work(state, inputs, targets)
        except NonFiniteError:
            for tensor, before in kept:
                tensor.copy_(before)
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = min(batch_size_of(inputs), state.progress.micro_batch or math.inf)
            half = math.ceil(size / 2)
            if state.settings.on_oom != "split" or state.phase is Phase.UPDATING or size == 1:
                effect = (
                    "of which batch norm sees each alone"
                    if state.objects.tracks_statistics
                    else "which changes no number"
                )
                hint = f"set micro_batch={half}, {effect}" if size > 1 else "take a smaller model"
                peak = f"{peak_memory(state.objects.device) / 2**30:.2f} GiB"
                cause = f"{state.device} ran out of memory: inputs {shape_of(inputs)}, {size} at a time, peak {peak}"
                raise OutOfMemoryError(cause, hint=hint) from error
        state.progress.micro_batch = half
        state.objects.optimizer.zero_grad()
        if state.objects.scaler is not None:  # which may have unscaled the gradients of the step
            scale, state.objects.scaler = (
                state.objects.scaler.state_dict(),
                torch.amp.GradScaler(state.objects.device.type),
            )
            state.objects.scaler.load_state_dict(scale)
        for tensor, before in kept:
            tensor.copy_(before)
        empty_cache(state.objects.device)
        call_hooks(hooks, "on_split", state)


# ------------------------------------------------------------------------- what is reported


def record_last_step(state: State, norm: Tensor | None) -> None:
    """Keep what is reported of an epoch's last step: rates and gradient, before anything changes them."""
    groups = enumerate(state.objects.optimizer.param_groups)
    rates = {f"lr/{group.get('name', number)}": group.get("lr") for number, group in groups}
    state.progress.rates = {name: float(rate) for name, rate in rates.items() if rate is not None}
    state.progress.grad_norm = norm
    state.progress.gradients = {
        f"grad/{name}": scalar_or_norm(tensor.grad) for name, tensor in state.objects.watch.items()
    }


def last_step_metrics(state: State) -> Metrics:
    """The learning rates, the gradient's norm and the watched parameters, as the last step had them.

    A parameter with several elements is given by its norm, and so is its gradient.
    """
    values = {f"param/{name}": scalar_or_norm(tensor) for name, tensor in state.objects.watch.items()}
    return {
        **state.progress.rates,
        "grad_norm": scalar_or_norm(state.progress.grad_norm),
        **values,
        **state.progress.gradients,
    }


def scalar_or_norm(tensor: Tensor | None) -> float | None:
    """A tensor of one element by its value, any other by its norm."""
    if tensor is None:
        return None
    return float(tensor.item() if tensor.numel() == 1 and not tensor.is_complex() else tensor.norm().item())

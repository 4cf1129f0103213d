"""Batches that may not be split, because their loss is not the sum of the losses of their parts.

A contrastive loss, a maximum over the batch, or a mean over an undeclared number does not add up. A loss or a model
declares this by `whole_batch = True`. Without a declaration, a comparison finds it before the first split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import ConfigError, OutOfMemoryError
from trainkit.core.pytree import batch_size_of, map_tensors, tensors_in
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import denominator, loss_of, whole_batch_part
from trainkit.training.state import Objects, State

LOSS_TOLERANCE = 1e-4  # relative; float32 sums in another order differ by about 1e-6
MODEL_TOLERANCE = 1e-3  # relative; the layers of a deep model amplify such differences


@dataclass(frozen=True)
class Finding:
    """The result of a comparison; without a difference and a reason, the losses add up.

    Args:
        difference: what differs, for messages.
        unknown: why the comparison is impossible, for messages.
        is_sum: the loss is the plain sum of the losses of the parts.
    """

    difference: str = ""
    unknown: str = ""
    is_sum: bool = False


def check_split(state: State, inputs: Any, targets: Any, hooks: Sequence[Any]) -> None:
    """Check that a batch may be split if the micro batch in force splits it. Only the first check compares.

    The check does not change weights, gradients, buffers and RNG states. `whole_batch = False` in the loss or the
    model excludes that part from the comparison.

    Args:
        state: the state of the training.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        hooks: their `on_note` is called if the comparison is impossible.

    Raises:
        ConfigError: the loss needs the whole batch, and the config sets `micro_batch`.
        OutOfMemoryError: the loss needs the whole batch, which does not fit into memory.
    """
    progress, objects = state.progress, state.objects
    size = progress.micro_batch
    if progress.split_checked or size is None or size >= batch_size_of(inputs):
        return
    declared = whole_batch_part(objects.model, objects.loss_fn)
    if declared is not None:
        raise _refusal(state, f"{name_and_place(declared)} has whole_batch = True")
    progress.split_checked = True
    try:
        finding = compare_parts(objects, inputs, targets, size)
    except Exception as error:  # the step that follows reports errors of the user's code
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        finding = Finding(unknown="memory ran out" if is_out_of_memory(error) else text)
    if finding.difference:
        raise _refusal(state, finding.difference, is_sum=finding.is_sum)
    if finding.unknown:
        text = "note: it is unknown whether the losses of micro batches add up to the loss of their batch"
        advice = "a loss that compares samples of a batch needs whole_batch = True"
        call_hooks(hooks, "on_note", state, f"{text} ({finding.unknown}); {advice}")


def _refusal(state: State, reason: str, *, is_sum: bool = False) -> ConfigError | OutOfMemoryError:
    """Return the error for a batch that may not be split. The exit code is 2 if the config asked for it, else 8."""
    declare = "a loss that is a mean over another number than samples needs denominator(targets): see docs/numbers.md"
    declare = "a loss that sums over the batch needs reduction = 'sum'" if is_sum else declare
    asked = state.settings.micro_batch
    if state.progress.micro_batch == asked:
        return ConfigError(f"micro_batch={asked}: {reason}", hint=f"write micro_batch=off; {declare}")
    cause = f"{state.device} ran out of memory, and the batch may not be split: {reason}"
    return OutOfMemoryError(cause, hint=f"lower batch_size; {declare}")


# ------------------------------------------------------------------------------------ the comparison


@torch.no_grad()
def compare_parts(objects: Objects, inputs: Any, targets: Any, size: int) -> Finding:
    """Compare the loss of a batch with the sum over its micro batches.

    The loss is compared first, on the same outputs, so batch norm and dropout have no effect. Then the model is
    compared: one micro batch with its two halves. No forward pass is larger than a micro batch or two samples.

    Args:
        objects: the objects of the training.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        size: the number of samples in a micro batch.
    """
    model, loss_fn, samples = objects.model, objects.loss_fn, batch_size_of(inputs)
    of_loss = Finding()
    with preserve_rng(), restored(model, loss_fn), _eager(model):
        if getattr(loss_fn, "whole_batch", None) is None:
            with _evaluation_mode(model, only_torch=True):
                outputs = [model(part) for part in split_rows(inputs, samples, size)]
            try:
                joined = join_rows(outputs)
            except ValueError:  # such as a model that returns its own loss; the second comparison includes the loss
                joined = None
            for part in (size, max(2, size // 4)):  # one partition may add up by chance
                if joined is not None and not of_loss.difference:
                    of_loss = compare(identity, loss_fn, joined, targets, samples, part, LOSS_TOLERANCE)
        if of_loss.difference or getattr(model, "whole_batch", None) is not None:
            return of_loss
        few = max(size, 2)
        inputs, targets = (next(split_rows(batch, samples, few)) for batch in (inputs, targets))
        of_model = Finding()
        for only_torch in (True, False):  # custom random layers need the evaluation mode, too
            with _evaluation_mode(model, only_torch=only_torch):
                of_model = compare(model, loss_fn, inputs, targets, few, -(-few // 2), MODEL_TOLERANCE)
            if not of_model.unknown:
                break
    return of_model if of_model.difference or not of_loss.unknown else of_loss


def compare(
    forward: Callable[[Any], Any],
    loss_fn: nn.Module,
    inputs: Any,
    targets: Any,
    samples: int,
    size: int,
    tolerance: float = LOSS_TOLERANCE,
) -> Finding:
    """Compare the loss of a batch with the sum over its parts. Gradients must be off. RNG states change.

    Args:
        forward: makes outputs of inputs.
        loss_fn: the loss.
        inputs: nested tensors with a multiple of `samples` rows.
        targets: nested tensors with a multiple of `samples` rows.
        samples: the number of samples in the batch.
        size: the number of samples in a part.
        tolerance: the largest relative difference that counts as equal.
    """

    def loss_of_whole(seed: int) -> float:
        torch.manual_seed(seed)
        return float(loss_fn(forward(inputs), targets))

    torch.manual_seed(0)
    weight = denominator(loss_fn, targets, samples)
    shares, plain = [], []
    for start, part, part_targets in zip(
        range(0, samples, size), split_rows(inputs, samples, size), split_rows(targets, samples, size), strict=True
    ):
        outputs, count = forward(part), min(size, samples - start)
        share = loss_of(loss_fn, outputs, part_targets, count, weight)
        shares.append(0.0 if share is None else float(share))
        plain.append(float(loss_fn(outputs, part_targets)))
    whole = loss_of_whole(0)
    if _close(whole, shares, tolerance):
        return Finding()
    if whole != loss_of_whole(1):
        return Finding(unknown=f"{name_and_place(loss_fn if forward is identity else forward)} draws random numbers")
    cause = name_and_place(loss_fn) if forward is identity else "the model or its loss"
    what = f"the loss of {samples} samples is {whole:.4f}, the losses of their parts add up to {sum(shares):.4f}"
    is_sum = _close(whole, plain, tolerance)
    verb = "sums over the batch" if is_sum else "is not the mean over the samples"
    return Finding(f"{cause} {verb}: {what}", is_sum=is_sum)


def identity(outputs: Any) -> Any:
    """Return the outputs; a model for `compare` that leaves only the loss."""
    return outputs


def _close(whole: float, shares: Sequence[float], tolerance: float) -> bool:
    """Return whether shares add up to the whole. The step reports a whole that is not finite."""
    if not math.isfinite(whole):
        return True
    if not all(map(math.isfinite, shares)):
        return False
    return abs(whole - math.fsum(shares)) <= tolerance * max(abs(whole), math.fsum(map(abs, shares)))


# ------------------------------------------------------------------------------------- rows and modes


def split_rows(batch: Any, samples: int, size: int) -> Iterator[Any]:
    """Yield the rows of a batch in parts of `size` samples.

    Raises:
        ValueError: the rows of a tensor are not a multiple of `samples`.
    """
    if any(not tensor.dim() or len(tensor) % samples for tensor in tensors_in(batch)):
        raise ValueError(f"the rows are not a multiple of {samples} samples")
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        yield map_tensors(batch, lambda t, a=start, b=stop: t[a * (len(t) // samples) : b * (len(t) // samples)])  # type: ignore[misc]


def join_rows(parts: Sequence[Any]) -> Any:
    """Return the parts of a batch as one batch.

    Raises:
        ValueError: the parts have no rows, or differ in structure.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if any(not isinstance(p, Tensor) or not p.dim() or p.shape[1:] != first.shape[1:] for p in parts):
            raise ValueError("tensors without rows, or of different shapes")
        return torch.cat([*parts])
    if type(first) is dict:
        return {key: join_rows([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        joined = [join_rows(values) for values in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if first is None:
        return None
    raise ValueError(f"{type(first).__name__} has no rows")


@contextmanager
def restored(*modules: nn.Module) -> Iterator[None]:
    """Restore the buffers and the attributes of modules at the end of the block."""
    inner = [module for outer in modules for module in outer.modules()]
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in inner]
    values = [(tensor, tensor.clone()) for outer in modules for tensor in outer.buffers()]
    try:
        yield
    finally:
        for module, content, buffers in attributes:
            module.__dict__.clear()
            module.__dict__.update(content)
            module._buffers.clear()
            module._buffers.update(buffers)
        for tensor, before in values:
            tensor.copy_(before)


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Turn compiled code off in the block: parts of other sizes would be compiled again."""
    return nullcontext() if model._compiled_call_impl is None else torch.compiler.set_stance("force_eager")


@contextmanager
def _evaluation_mode(model: nn.Module, *, only_torch: bool) -> Iterator[None]:
    """Set layers to evaluation mode in the block: all layers, or torch's layers such as batch norm and dropout.

    Torch's fast path of attention is off, because it changes the shapes of padded sequences. Use it in `restored`.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module, _ in modes:
            norm_or_dropout = isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd)
            if not only_torch or norm_or_dropout or type(module).__module__.startswith("torch.nn."):
                module.training = False
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                # Without running statistics, batch norm takes those of the batch in evaluation mode, too.
                module.running_mean = torch.zeros(module.num_features, device=next(model.parameters()).device)
                module.running_var = torch.ones_like(module.running_mean)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast_path)

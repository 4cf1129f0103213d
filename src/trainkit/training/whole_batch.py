"""Batches that may not be split, because their loss is not the sum of the losses of their parts.

Contrastive losses, maxima over the batch and means over an undeclared number do not add up. A loss or a model declares
this by `whole_batch = True`. Without a declaration, a comparison finds it before the first split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import ConfigError, OutOfMemoryError
from trainkit.core.pytree import batch_size_of, join_rows, map_tensors, take_rows_of_samples
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import denominator, loss_contribution, whole_batch_module
from trainkit.training.state import Objects, State
from trainkit.training.step import micro_batches

LOSS_TOLERANCE = 1e-4  # relative; float32 sums in another order differ by about 1e-6
MODEL_TOLERANCE = 1e-3  # relative; the layers of a deep model amplify such differences
DENOMINATOR_HINT = (
    "a loss that is a mean over another number than samples needs denominator(targets): see docs/numbers.md"
)


@dataclass(frozen=True)
class Finding:
    """The result of a comparison. If both texts are empty, the losses add up.

    Args:
        difference: what differs, for messages.
        unknown: why the comparison is impossible, for messages.
        is_sum: whether the loss is the plain sum of the losses of the parts.
    """

    difference: str = ""
    unknown: str = ""
    is_sum: bool = False


def check_may_split(state: State, inputs: Any, targets: Any, hooks: Sequence[Any]) -> None:
    """Raise an error if the micro batch in force splits a batch whose loss does not add up.

    Only the first such call compares. The comparison does not change weights, gradients, buffers and RNG states.
    `whole_batch = False` in the loss or the model turns the comparison off.

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
    declared = whole_batch_module(objects.model, objects.loss_fn)
    if declared is not None:
        raise declared_error(declared, size)
    progress.split_checked = True
    if any(getattr(module, "whole_batch", None) is False for module in (objects.model, objects.loss_fn)):
        return
    try:
        finding = compare_loss_and_model(objects, inputs, targets, size)
    except Exception as error:  # the step that follows reports errors of the user's code
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        finding = Finding(unknown="memory ran out" if is_out_of_memory(error) else text)
    if finding.difference:
        raise _split_error(state, finding)
    if finding.unknown:
        text = "note: it is unknown whether the losses of micro batches add up to the loss of their batch"
        advice = "a loss that compares samples of a batch needs whole_batch = True"
        call_hooks(hooks, "on_note", state, f"{text} ({finding.unknown}); {advice}")


def declared_error(module: nn.Module, micro_batch: int) -> ConfigError:
    """Return the error for a `micro_batch` with a loss or a model that declares `whole_batch = True`."""
    cause = f"micro_batch={micro_batch}: {name_and_place(module)} has whole_batch = True"
    return ConfigError(cause, hint="write micro_batch=off, and a batch_size that fits into memory")


def _split_error(state: State, finding: Finding) -> ConfigError | OutOfMemoryError:
    """Return the error for a batch that may not be split. The exit code is 2 if the config asked for it, else 8."""
    hint = "a loss that sums over the batch needs reduction = 'sum'" if finding.is_sum else DENOMINATOR_HINT
    asked = state.settings.micro_batch
    if state.progress.micro_batch == asked:
        return ConfigError(f"micro_batch={asked}: {finding.difference}", hint=f"write micro_batch=off; {hint}")
    cause = f"{state.device} ran out of memory, and the batch may not be split: {finding.difference}"
    return OutOfMemoryError(cause, hint=f"lower batch_size; {hint}")


# ------------------------------------------------------------------------------------ the comparison


@torch.no_grad()
def compare_loss_and_model(objects: Objects, inputs: Any, targets: Any, size: int) -> Finding:
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
    loss_finding = model_finding = Finding()
    with preserve_rng(), restored(model, loss_fn), _without_compiled_code(model):
        with _evaluation_mode(model, only_torch=True):
            outputs = [model(part) for part, _ in micro_batches(inputs, targets, size)]
        try:
            joined = join_rows(outputs)
        except ValueError:  # such as a model that returns its own loss, which the second comparison includes
            joined = None
        if joined is not None:
            loss_finding = compare_loss(loss_fn, joined, targets, samples, (size, max(2, size // 4)))
        if loss_finding.difference:
            return loss_finding
        inputs, targets = next(micro_batches(inputs, targets, max(size, 2)))
        samples = batch_size_of(inputs)
        for only_torch in (True, False):  # custom random layers need the evaluation mode, too
            with _evaluation_mode(model, only_torch=only_torch):
                model_finding = _compare(
                    "the model or its loss", model, loss_fn, (inputs, targets), samples, -(-samples // 2)
                )
            if not model_finding.unknown:
                break
    return model_finding if model_finding.difference or not loss_finding.unknown else loss_finding


def compare_loss(loss_fn: nn.Module, outputs: Any, targets: Any, samples: int, sizes: Iterable[int]) -> Finding:
    """Compare the loss of a batch of outputs with the sum over its parts. Gradients must be off. RNG states change.

    Args:
        loss_fn: the loss.
        outputs: nested tensors with a multiple of `samples` rows.
        targets: the targets of the batch.
        samples: the number of samples in the batch.
        sizes: the number of samples in a part. Several sizes, because the losses of one may add up by chance.
    """
    for size in sizes:
        finding = _compare(name_and_place(loss_fn), None, loss_fn, (outputs, targets), samples, size)
        if finding != Finding():
            return finding
    return Finding()


def _compare(
    name: str, model: nn.Module | None, loss_fn: nn.Module, batch: tuple[Any, Any], samples: int, size: int
) -> Finding:
    """Compare the loss of a batch with the sum over its parts; without a model, the inputs are outputs."""
    inputs, targets = batch

    def outputs_of(part: Any) -> Any:
        return part if model is None else model(part)

    def loss_of_batch(seed: int) -> float:
        torch.manual_seed(seed)
        return float(loss_fn(outputs_of(inputs), targets))

    batch_denominator = denominator(loss_fn, targets, samples)
    contributions, values = [], []
    torch.manual_seed(0)
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        outputs = outputs_of(take_rows_of_samples(inputs, samples, start, stop))
        part_targets = map_tensors(targets, lambda t, a=start, b=stop: t[a:b])  # type: ignore[misc]  # as the step does
        contribution = loss_contribution(loss_fn, outputs, part_targets, stop - start, batch_denominator)
        contributions.append(0.0 if contribution is None else float(contribution))
        values.append(float(loss_fn(outputs, part_targets)))
    loss = loss_of_batch(0)
    tolerance = LOSS_TOLERANCE if model is None else MODEL_TOLERANCE
    if _adds_up(loss, contributions, tolerance):
        return Finding()
    if loss != loss_of_batch(1):
        return Finding(unknown=f"{name} draws random numbers")
    is_sum = _adds_up(loss, values, tolerance)
    kind = "is not the mean over the samples" if model is None else "compares samples"
    if callable(getattr(loss_fn, "denominator", None)) and model is None:
        kind = "is not the mean that its denominator(targets) says"
    kind = "sums over the batch" if is_sum else kind
    found = f"the loss of {samples} samples is {loss:.4f}, the losses of their parts add up to {sum(contributions):.4f}"
    return Finding(f"{name} {kind}: {found}", is_sum=is_sum)


def _adds_up(loss: float, contributions: Sequence[float], tolerance: float) -> bool:
    """Return whether contributions add up to a loss. The step reports a loss that is not finite."""
    if not math.isfinite(loss):
        return True
    if not all(map(math.isfinite, contributions)):
        return False
    return abs(loss - math.fsum(contributions)) <= tolerance * max(abs(loss), math.fsum(map(abs, contributions)))


# --------------------------------------------------------------------------------- state and modes


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


def _without_compiled_code(model: nn.Module) -> AbstractContextManager[Any]:
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
                # Without running statistics, batch norm uses batch statistics in evaluation mode, too.
                module.running_mean = torch.zeros(module.num_features, device=next(model.parameters()).device)
                module.running_var = torch.ones_like(module.running_mean)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast_path)

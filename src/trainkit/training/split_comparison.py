"""Compare the loss of a batch with the losses of its parts. The comparison works on copies, so no state changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.pytree import (
    batch_size_of,
    join_rows,
    map_tensors,
    take_rows_of_samples,
    take_samples,
    tensors_in,
)
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.training.copies import clone_tensors, copy_module, set_evaluation_mode, without_fast_attention
from trainkit.training.custom_step import CustomStep
from trainkit.training.losses import denominator, loss_contribution
from trainkit.training.state import State
from trainkit.training.step import micro_batches

LOSS_TOLERANCE = 1e-4  # relative; float32 sums in another order differ by about 1e-6
MODEL_TOLERANCE = 1e-3  # relative; the layers of a deep model amplify such differences
SMALLEST = 1e-7  # absolute; smaller losses consist of rounding errors


@dataclass(frozen=True)
class Finding:
    """The result of a comparison. If both texts are empty, the losses add up.

    Attributes:
        difference: what differs, for messages.
        unknown: why the comparison is impossible, for messages.
        is_sum: whether the loss is the plain sum of the losses of the parts.
    """

    difference: str = ""
    unknown: str = ""
    is_sum: bool = False


@torch.no_grad()
def compare_loss_and_model(model: nn.Module, loss_fn: nn.Module, inputs: Any, targets: Any, size: int) -> Finding:
    """Compare the loss of a batch with the sum over its micro batches. It works on copies, so no state changes.

    The loss is compared first, on the same outputs, so batch norm and dropout have no effect. Then the model is
    compared: one micro batch with its two halves. No forward pass is larger than a micro batch or two samples.

    Args:
        model: the model.
        loss_fn: the loss.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        size: the number of samples in a micro batch.
    """
    loss_finding = model_finding = Finding()
    with preserve_rng(), without_fast_attention():
        copied = set_evaluation_mode(copy_module(model), only_torch=True)
        parts = (part for part, _ in micro_batches(inputs, targets, size))
        outputs = [(copied(clone_tensors(part)), batch_size_of(part)) for part in parts]
        del copied
        try:
            joined = _join(outputs)
        except ValueError:  # such as a model that returns its own loss, which the second comparison includes
            joined = None
        if joined is not None:
            loss_finding = compare_loss(loss_fn, joined, targets, batch_size_of(inputs), (size, max(2, size // 4)))
        if loss_finding.difference:
            return loss_finding
        inputs, targets = next(micro_batches(inputs, targets, max(size, 2)))
        for only_torch in (True, False):  # custom random layers need the evaluation mode, too
            model_finding = _compare_model(
                model, loss_fn, inputs, targets, only_torch=only_torch, loss_adds_up=joined is not None
            )
            if not model_finding.unknown:
                break
    return model_finding if model_finding.difference or not loss_finding.unknown else loss_finding


def compare_loss(loss_fn: nn.Module, outputs: Any, targets: Any, samples: int, sizes: Iterable[int]) -> Finding:
    """Compare the loss of a batch of outputs with the sum over its parts.

    It works on copies of the loss, the outputs and the targets. Gradients must be off. RNG states change.

    Args:
        loss_fn: the loss.
        outputs: nested tensors with a multiple of `samples` rows.
        targets: the targets of the batch.
        samples: the number of samples in the batch.
        sizes: numbers of samples in a part. Several sizes are tried, because one partition may add up by chance.
    """
    outputs = map_tensors(outputs, lambda t: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t)

    def evaluate(start: int, stop: int, seed: int = 0) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        part = take_rows_of_samples(outputs, samples, start, stop)
        copied = set_evaluation_mode(copy_module(loss_fn), only_torch=True)
        return copied, clone_tensors(part), clone_tensors(take_samples(targets, start, stop, samples))

    for size in sizes:
        finding = _compare(name_and_place(loss_fn), evaluate, targets, samples, size, LOSS_TOLERANCE)
        if finding != Finding():
            return finding
    return Finding()


def _compare_model(
    model: nn.Module, loss_fn: nn.Module, inputs: Any, targets: Any, *, only_torch: bool, loss_adds_up: bool
) -> Finding:
    """Compare the loss of a micro batch with the sum over its halves.

    Args:
        model: the model.
        loss_fn: the loss.
        inputs: the inputs of the micro batch.
        targets: the targets of the micro batch.
        only_torch: see `set_evaluation_mode`.
        loss_adds_up: the losses of equal outputs add up, so equal outputs mean that there is no difference.
    """
    samples = batch_size_of(inputs)
    half = -(-samples // 2)
    outputs: dict[tuple[int, int], Any] = {}

    def evaluate(start: int, stop: int, seed: int = 0) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        both = copy_module(nn.ModuleList([model, loss_fn]))  # together, because they may share modules
        copied, copied_loss = set_evaluation_mode(both, only_torch=only_torch).children()
        outputs[start, stop] = copied(clone_tensors(take_samples(inputs, start, stop, samples)))
        return copied_loss, outputs[start, stop], clone_tensors(take_samples(targets, start, stop, samples))

    precision = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    tolerance = max(MODEL_TOLERANCE, 16 * precision)
    finding = _compare("the model or its loss", evaluate, targets, samples, half, tolerance)
    with suppress(ValueError):
        joined = _join([(outputs[0, half], half), (outputs[half, samples], samples - half)])
        whole, parts = tensors_in(outputs[0, samples]), tensors_in(joined)
        if loss_adds_up and all(_is_close(a, b, tolerance) for a, b in zip(whole, parts, strict=True)):
            return Finding()  # a tiny loss, whose rounding errors are large
    return finding


Evaluate = Callable[..., tuple[nn.Module, Any, Any]]  # (start, stop, seed) -> the loss, the outputs and the targets


def _compare(name: str, evaluate: Evaluate, targets: Any, samples: int, size: int, tolerance: float) -> Finding:
    """Compare the loss of a batch with the sum over its parts."""
    contributions, values = [], []
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        loss_fn, outputs, part_targets = evaluate(start, stop)
        batch_denominator = denominator(loss_fn, targets, samples)
        contribution = loss_contribution(loss_fn, outputs, part_targets, stop - start, batch_denominator)
        contributions.append(0.0 if contribution is None else float(contribution))
        if contribution is not None:
            loss_fn, outputs, part_targets = evaluate(start, stop)
            values.append(float(loss_fn(outputs, part_targets)))
    loss_fn, outputs, part_targets = evaluate(0, samples)
    loss = float(loss_fn(outputs, part_targets))
    if _adds_up(loss, contributions, tolerance):
        return Finding()
    loss_fn, outputs, part_targets = evaluate(0, samples, seed=1)
    if loss != float(loss_fn(outputs, part_targets)):
        return Finding(unknown=f"{name} draws random numbers")
    is_sum = _adds_up(loss, values, tolerance)
    has_denominator = callable(getattr(loss_fn, "denominator", None))
    mean = "that its denominator(targets) says" if has_denominator else "over the samples"
    kind = "sums over the batch" if is_sum else f"is not the mean {mean}"
    found = f"the loss of {samples} samples is {loss:.4g}, the losses of their parts add up to {sum(contributions):.4g}"
    return Finding(f"{name} {kind}: {found}", is_sum=is_sum)


def _adds_up(loss: float, contributions: Sequence[float], tolerance: float) -> bool:
    """Return whether contributions add up to a loss. The step reports a loss that is not finite."""
    if not math.isfinite(loss):
        return True
    if not all(map(math.isfinite, contributions)):
        return False
    scale = max(abs(loss), math.fsum(map(abs, contributions)))
    return abs(loss - math.fsum(contributions)) <= tolerance * scale + SMALLEST


@torch.no_grad()
def compare_step(step: CustomStep, state: State, inputs: Any, targets: Any, size: int) -> Finding:
    """Compare the result of a custom step for a micro batch with its results for the halves, on copies.

    Of a generator, the first loss is compared. Several ranks need a loss that is a mean over the samples, if the step
    returns no denominator. In one process, such a step is not compared, because its batches are not split.

    Args:
        step: the custom step.
        state: the state of the training.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        size: the number of samples in a micro batch.
    """
    inputs, targets = next(micro_batches(inputs, targets, max(size, 2)))
    finding = Finding()
    for only_torch in (True, False):  # custom random layers need the evaluation mode, too
        with preserve_rng(), without_fast_attention():
            finding = _compare_step_in_mode(step, state, inputs, targets, only_torch=only_torch)
        if not finding.unknown:
            break
    return finding


def _compare_step_in_mode(step: CustomStep, state: State, inputs: Any, targets: Any, *, only_torch: bool) -> Finding:
    """Compare the result of a custom step for a micro batch with its results for the halves; see `compare_step`.

    Args:
        step: the custom step.
        state: the state of the training.
        inputs: the inputs of the micro batch.
        targets: the targets of the micro batch.
        only_torch: see `set_evaluation_mode`.
    """
    objects, samples = state.objects, batch_size_of(inputs)
    half = -(-samples // 2)

    def evaluate(start: int, stop: int, seed: int = 0) -> tuple[float, float]:
        """Return the loss of some samples and its denominator, NaN if it is unknown."""
        torch.manual_seed(seed)
        copied = CustomStep(step.key, copy.deepcopy(step.function))
        both = copy_module(nn.ModuleList([objects.model, objects.loss_fn]))  # together: they may share modules
        model, loss_fn = set_evaluation_mode(both, only_torch=only_torch).children()
        part = clone_tensors(take_samples(inputs, start, stop, samples))
        part_targets = clone_tensors(take_samples(targets, start, stop, samples))
        returned = copied(model, part, part_targets, loss_fn, state.progress)
        result = copied.check_result(next(returned)[1] if step.is_generator else returned)
        default = stop - start if objects.ranks.are_several else math.nan
        return float(result.loss), default if result.denominator is None else float(result.denominator)

    loss, weight = evaluate(0, samples)
    parts = [evaluate(0, half), evaluate(half, samples)]
    total = sum(part_weight for _, part_weight in parts)
    if math.isnan(total) or weight == 0:
        return Finding()
    mean = math.fsum(part * part_weight for part, part_weight in parts if part_weight) / (total or 1.0)
    if not _adds_up(weight, [part_weight for _, part_weight in parts], MODEL_TOLERANCE):
        found = f"the denominator of {samples} samples is {weight:.4g}, those of their parts add up to {total:.4g}"
    elif not _adds_up(loss, [mean], MODEL_TOLERANCE):
        found = f"the loss of {samples} samples is {loss:.4g}, the mean over their parts is {mean:.4g}"
    else:
        return Finding()
    if evaluate(0, samples, seed=1) != (loss, weight):
        return Finding(unknown=f"{step.place} draws random numbers")
    default = " (the number of samples, if it returns none)" if objects.ranks.are_several else ""
    return Finding(f"{step.key}: {step.place} is not a mean over its denominator{default}: {found}")


# ------------------------------------------------------------------------------------- outputs


def _join(outputs: Sequence[tuple[Any, int]]) -> Any:
    """Join the outputs of the parts of a batch. Each part is given with its number of samples.

    Raises:
        ValueError: the rows of a tensor are not a multiple of the samples, or the samples may be in dimension 1.
    """
    tensors = [(tensor, samples) for part, samples in outputs for tensor in tensors_in(part)]
    rows = {len(tensor) / samples if tensor.dim() else 0.5 for tensor, samples in tensors}
    in_second = any(tensor.dim() > 1 and 1 < samples == tensor.shape[1] for tensor, samples in tensors)
    if in_second or not all(number.is_integer() for number in rows) or len(rows) > len(tensors) // len(outputs):
        raise ValueError("it is unknown which dimension of the outputs is that of the samples")
    return join_rows([part for part, _ in outputs])


def _is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return one.equal(other)
    return bool((one - other).abs().max() <= tolerance * one.abs().max())

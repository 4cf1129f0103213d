"""Batches that may not be split, because their loss is not the sum of the losses of their parts.

Micro batches and ranks split a batch. Contrastive losses, maxima over the batch and means over an undeclared number do
not add up. A loss, a model or a custom step declares this by `whole_batch = True`. Without a declaration, a comparison
finds it before the first split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import ConfigError, OutOfMemoryError
from trainkit.core.pytree import batch_size_of, join_rows, map_tensors
from trainkit.core.source import name_and_place
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import whole_batch_module, why_whole_batch
from trainkit.training.split_comparison import Finding, compare_loss_and_model, compare_step
from trainkit.training.state import State

SPLIT_KEYS = ("loss", "training_step", "evaluation_step")  # of the losses that are compared
ONE_RANK = "train in one process: start trainkit without torchrun"
DENOMINATOR_HINT = (
    "a loss that is a mean over another number than samples needs denominator(targets): see docs/numbers.md"
)


def check_may_split(state: State, inputs: Any, targets: Any, hooks: Sequence[Any]) -> None:
    """Raise an error if the micro batch in force, or several ranks, split a batch whose loss does not add up.

    Only the first such call compares. The comparison does not change weights, gradients, buffers and RNG states.
    `whole_batch = False` in the loss or the model turns the comparison off. Every rank must make the same calls.

    Args:
        state: the state of the training.
        inputs: the inputs of the batch.
        targets: the targets of the batch.
        hooks: their `on_note` is called if the comparison is impossible.

    Raises:
        ConfigError: the loss needs the whole batch, and the config sets `micro_batch` or there are several ranks.
        OutOfMemoryError: the loss needs the whole batch, which does not fit into memory.
    """
    progress, objects, step = state.progress, state.objects, state.custom_step
    size, is_shared = progress.micro_batch, objects.ranks.are_several
    if not is_shared and (size is None or size >= batch_size_of(inputs)):
        return
    key = "loss" if step is None else step.key
    if key in progress.split_checked:
        return
    if size is not None and not is_shared:
        _check_declared(state, size)
    progress.split_checked.add(key)
    if objects.sharded:  # a copy of the model would not work alone
        return
    function = None if step is None else step.function
    if any(getattr(part, "whole_batch", None) is False for part in (objects.model, objects.loss_fn, function)):
        return
    with objects.ranks.together():
        finding = _compare(state, inputs, targets)
        if finding.difference:
            raise _split_error(state, finding)
    if finding.unknown:
        parts = "the shares of the ranks" if is_shared else "micro batches"
        text = f"note: it is unknown whether the losses of {parts} add up to the loss of their batch"
        advice = "a loss that compares samples of a batch needs whole_batch = True"
        call_hooks(hooks, "on_note", state, f"{text} ({finding.unknown}); {advice}")


def _check_declared(state: State, micro_batch: int) -> None:
    """Raise `ConfigError` if a part of the training declares that its batches may not be split."""
    declared = whole_batch_module(state.objects.model, state.objects.loss_fn)
    if declared is not None:
        raise declared_error(declared, micro_batch)
    refusal = None if state.custom_step is None else state.custom_step.split_error(micro_batch)
    if refusal is not None:
        raise refusal


def _compare(state: State, inputs: Any, targets: Any) -> Finding:
    """Compare the loss of a batch, or of the share of this rank, with the losses of its parts."""
    objects, step, size = state.objects, state.custom_step, state.progress.micro_batch or math.inf
    try:
        if objects.ranks.are_several:
            inputs, targets = _comparable(state, inputs, targets)
            size = min(size, max(1, batch_size_of(inputs) // 2))
        if size >= batch_size_of(inputs):
            return Finding()
        if step is None:
            return compare_loss_and_model(objects.model, objects.loss_fn, inputs, targets, int(size))
        return compare_step(step, state, inputs, targets, int(size))
    except Exception as error:  # the step that follows reports errors of the user's code
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(unknown="memory ran out" if is_out_of_memory(error) else text)


def _comparable(state: State, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return the share of this rank, or the whole batch if some share has fewer than two samples."""
    if state.progress.smallest_share > 1:
        return inputs, targets
    shares = state.objects.ranks.gather(map_tensors((inputs, targets), lambda tensor: tensor.cpu()))
    whole: tuple[Any, Any] = join_rows([share for share in shares if batch_size_of(share[0])])
    return map_tensors(whole, lambda tensor: tensor.to(state.device))  # type: ignore[no-any-return]


def shared_batches(ranks: int) -> str:
    """Return what several ranks do, for messages."""
    return f"{ranks} ranks share each batch"


def declared_error(module: nn.Module, micro_batch: int) -> ConfigError:
    """Return the error for a `micro_batch` with a module whose batches may not be split, see `why_whole_batch`."""
    cause = f"micro_batch={micro_batch}: {name_and_place(module)} {why_whole_batch(module)}"
    return ConfigError(cause, hint="write micro_batch=off, and a batch_size that fits into memory")


def _split_error(state: State, finding: Finding) -> ConfigError | OutOfMemoryError:
    """Return the error for a batch that may not be split. The exit code is 8 if memory ran out, else 2."""
    hint = "a loss that sums over the batch needs reduction = 'sum'" if finding.is_sum else DENOMINATOR_HINT
    hint += "; whole_batch = False in the model or the loss allows the split"
    if state.objects.ranks.are_several:
        return ConfigError(
            f"{shared_batches(state.objects.ranks.size)}: {finding.difference}", hint=f"{ONE_RANK}; {hint}"
        )
    asked = state.settings.micro_batch
    if state.progress.micro_batch == asked:
        return ConfigError(f"micro_batch={asked}: {finding.difference}", hint=f"write micro_batch=off; {hint}")
    cause = f"{state.device} ran out of memory, and the batch may not be split: {finding.difference}"
    return OutOfMemoryError(cause, hint=f"lower batch_size; {hint}")

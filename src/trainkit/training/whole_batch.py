"""Batches that may not be split, because their loss is not the sum of the losses of their parts.

Contrastive losses, maxima over the batch and means over an undeclared number do not add up. A loss, a model or a custom
step declares this by `whole_batch = True`. Without a declaration, a comparison finds it before the first split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import ConfigError, OutOfMemoryError
from trainkit.core.pytree import batch_size_of
from trainkit.core.source import name_and_place
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import whole_batch_module, why_whole_batch
from trainkit.training.split_comparison import Finding, compare_loss_and_model, compare_step
from trainkit.training.state import State

DENOMINATOR_HINT = (
    "a loss that is a mean over another number than samples needs denominator(targets): see docs/numbers.md"
)


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
    step = state.custom_step
    refusal = None if step is None else step.split_error(size)
    if refusal is not None:
        raise refusal
    progress.split_checked = True
    function = None if step is None else step.function
    if any(getattr(part, "whole_batch", None) is False for part in (objects.model, objects.loss_fn, function)):
        return
    try:
        if step is None:
            finding = compare_loss_and_model(objects.model, objects.loss_fn, inputs, targets, size)
        else:
            finding = compare_step(step, state, inputs, targets, size)
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
    """Return the error for a `micro_batch` with a module whose batches may not be split, see `why_whole_batch`."""
    cause = f"micro_batch={micro_batch}: {name_and_place(module)} {why_whole_batch(module)}"
    return ConfigError(cause, hint="write micro_batch=off, and a batch_size that fits into memory")


def _split_error(state: State, finding: Finding) -> ConfigError | OutOfMemoryError:
    """Return the error for a batch that may not be split. The exit code is 2 if the config asked for it, else 8."""
    hint = "a loss that sums over the batch needs reduction = 'sum'" if finding.is_sum else DENOMINATOR_HINT
    hint += "; whole_batch = False in the model or the loss allows the split"
    asked = state.settings.micro_batch
    if state.progress.micro_batch == asked:
        return ConfigError(f"micro_batch={asked}: {finding.difference}", hint=f"write micro_batch=off; {hint}")
    cause = f"{state.device} ran out of memory, and the batch may not be split: {finding.difference}"
    return OutOfMemoryError(cause, hint=f"lower batch_size; {hint}")

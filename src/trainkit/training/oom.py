"""Out of memory: repeat a batch in smaller micro batches, or raise an error with the fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainkit.core.device import empty_cache, is_out_of_memory, peak_memory
from trainkit.core.errors import NonFiniteError, OutOfMemoryError
from trainkit.core.pytree import batch_size_of, describe
from trainkit.training.carried import capture_carried, restore_carried
from trainkit.training.hooks import call_hooks
from trainkit.training.losses import whole_batch_module
from trainkit.training.state import Phase, State
from trainkit.training.whole_batch import check_may_split

Result = TypeVar("Result")


def run_with_oom_split(
    work: Callable[[State, Any, Any], Result], state: State, inputs: Any, targets: Any, hooks: Sequence[Any]
) -> Result:
    """Return the result of `work` on a batch; if memory runs out, halve the micro batch and repeat the work.

    Raises:
        OutOfMemoryError: `on_oom` is stop, one sample is too much, the weights may have changed already, or the
            batch may not be split.
        NonFiniteError: from `work`; the batch statistics and the carried state are restored first.
    """
    statistics = [(tensor, tensor.clone()) for tensor in state.objects.statistics]
    carried = capture_carried(state.objects.carrying)
    while True:
        check_may_split(state, inputs, targets, hooks)
        try:
            return work(state, inputs, targets)
        except NonFiniteError:
            _restore(statistics)
            restore_carried(carried)
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = int(min(batch_size_of(inputs), state.progress.micro_batch or math.inf))
            if state.phase is not Phase.UPDATING and not state.objects.sharded:  # every rank has this error
                size = max(row[0] for row in state.objects.ranks.agree(size))
            half = math.ceil(size / 2)
            may_split = state.custom_step is None or state.custom_step.may_split
            if state.settings.on_oom != "split" or not may_split or state.phase is Phase.UPDATING or size == 1:
                raise _oom_error(state, inputs, size, half) from error
        # Outside of the except block, because the error keeps the tensors of its frames alive.
        state.progress.micro_batch = half
        state.progress.split_checked.clear()  # memory may have run out in the comparison, too
        _undo_step(state)
        _restore(statistics)
        empty_cache(state.objects.device)
        check_may_split(state, inputs, targets, hooks)  # before the hooks report the split
        call_hooks(hooks, "on_split", state)


def _oom_error(state: State, inputs: Any, size: int, half: int) -> OutOfMemoryError:
    objects = state.objects
    effect = (
        "results change slightly, as batch norm computes its statistics per micro batch"
        if objects.tracks_statistics
        else "the results do not change"
    )
    hint = f"set micro_batch={half}; {effect}" if size > 1 else "use a smaller model"
    step = state.custom_step
    is_whole = whole_batch_module(objects.model, objects.loss_fn) is not None or (
        step is not None and not step.may_split
    )
    if size > 1 and is_whole:
        hint = "lower batch_size: the batch may not be split"
    peak = f"{peak_memory(objects.device) / 2**30:.2f} GiB"
    at_a_time = f"{size} sample{'s' * (size != 1)} at a time"
    cause = f"{objects.device} ran out of memory: inputs {describe(inputs)}, {at_a_time}, peak {peak}"
    return OutOfMemoryError(cause, hint=hint)


def _undo_step(state: State) -> None:
    objects = state.objects
    objects.optimizer.zero_grad()
    if objects.scaler is not None:  # a new scaler, because the step may have unscaled its gradients
        scale = objects.scaler.state_dict()
        objects.scaler = torch.amp.GradScaler(objects.device.type)
        objects.scaler.load_state_dict(scale)


def _restore(statistics: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in statistics:
        tensor.copy_(before)

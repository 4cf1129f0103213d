"""Stop the training at a signal: at once while it waits for a batch or validates, otherwise after the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from trainkit.core.errors import Stopped
from trainkit.data.prepare import Batch
from trainkit.training.state import Phase, State


def stoppable_batches(state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches up to the last step; a signal stops the training while the loop waits for a batch."""
    while not state.at_limit:
        with interruptible(state, Phase.WAITING):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def interruptible(state: State, phase: Phase) -> Iterator[None]:
    """Set the phase for the block, in which a signal handler may raise `state.stop`.

    Raises:
        Stopped: a stop was requested earlier, or in the block and an `except` has swallowed it.
    """
    if state.stop is not None:
        raise state.stop
    before, state.phase = state.phase, phase
    try:
        yield
    finally:
        state.phase = before
    if state.stop is not None:
        raise state.stop


@contextmanager
def restore_buffers_if_stopped(*modules: nn.Module) -> Iterator[None]:
    """Restore the modules' buffers if the block is stopped, because the validation will start again."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    except Stopped:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise

"""Stop the training at a signal: at once while it waits for a batch or validates, otherwise after the step.

Several ranks stop together, when they agree on the next batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from trainkit.core.errors import Stopped
from trainkit.core.pytree import batch_size_of
from trainkit.data.prepare import NO_SAMPLES, Batch
from trainkit.data.unreadable import check_number_of_unreadable, unreadable_batch_error
from trainkit.training.state import Phase, State
from trainkit.training.tokens import count_tokens


def stoppable_batches(state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches up to the last step; a signal stops the training while the loop waits for a batch.

    With several ranks these are the shares of this rank, and every rank gets as many.
    """
    while not state.at_limit:
        with interruptible(state, Phase.WAITING):
            batch = next_share(state, batches)
        if batch is None:
            return
        yield batch


def next_share(state: State, batches: Iterator[Batch]) -> Batch | None:
    """Return the next batch, or this rank's share of it, and set the counts of the batch; None: there is none.

    Raises:
        Stopped: a rank has got a signal.
        OtherRankError: another rank failed to read its share.
    """
    ranks, progress = state.objects.ranks, state.progress
    if not ranks.are_several:
        batch = next(batches, None)
        if batch is not None:
            progress.samples_of_batch, progress.tokens_of_batch = batch_size_of(batch[0]), count_tokens(batch[0])
        return batch
    with ranks.together() as agreement:
        batch = next(batches, None)
        inputs = NO_SAMPLES[0] if batch is None else batch[0]
        signal = 0 if state.stop is None else state.stop.number
        micro_batch = progress.micro_batch or sys.maxsize
        agreement.offer(batch is not None, signal, micro_batch, batch_size_of(inputs), int(count_tokens(inputs)))
    exists, signals, micro_batches, samples, tokens = agreement.columns
    if any(signals):  # the ranks may have got different signals
        number = next(filter(None, signals))
        state.stop = state.stop if state.stop is not None and state.stop.number == number else Stopped(number)
        raise state.stop
    # If memory ran out on one rank, all ranks use its smaller micro batches.
    progress.micro_batch = None if min(micro_batches) == sys.maxsize else min(micro_batches)
    progress.samples_of_batch, progress.tokens_of_batch = sum(samples), sum(tokens)
    if any(exists) and not sum(samples):  # no rank could read its share
        raise unreadable_batch_error(
            {index: text for part in progress.unreadable.values() for index, text in part.items()}
        )
    progress.smallest_share, progress.largest_share = min(samples), max(samples)
    return (batch or NO_SAMPLES) if any(exists) else None


def share_unreadable(state: State) -> None:
    """Add the skipped samples of the other ranks to those of this rank.

    Raises:
        DataError: all ranks together have skipped more samples than they may.
    """
    ranks, known = state.objects.ranks, state.progress.unreadable
    if not ranks.are_several or not any(map(sum, ranks.agree(sum(map(len, known.values()))))):
        return
    for of_rank in ranks.gather({part: dict(samples) for part, samples in known.items()}):
        for part, samples in of_rank.items():
            known[part].update(samples)
    for part, samples in known.items():
        if samples and part in state.loaders:
            check_number_of_unreadable(samples, state.loaders[part].dataset, next(reversed(samples.values())))


@contextmanager
def interruptible(state: State, phase: Phase) -> Iterator[None]:
    """Set the phase for the block, in which a signal handler may raise `state.stop`.

    Raises:
        Stopped: a stop was requested earlier, or in the block and an `except` has swallowed it.
    """
    is_alone = not state.objects.ranks.are_several
    if state.stop is not None and is_alone:
        raise state.stop
    before, state.phase = state.phase, phase
    try:
        yield
    finally:
        state.phase = before
    if state.stop is not None and is_alone:
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

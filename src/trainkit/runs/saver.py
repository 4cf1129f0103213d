"""The hooks that write checkpoints and go back to them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from trainkit.config.schema import CheckpointSettings
from trainkit.core.errors import CheckpointError, NonFiniteError, StorageError
from trainkit.core.memory import free_host_memory
from trainkit.core.pytree import copy_to_cpu, tensors_in
from trainkit.core.ranks import Ranks
from trainkit.runs.background import Background
from trainkit.runs.checkpoint import Checkpoints, checkpoint_name
from trainkit.runs.checkpoint_files import DamagedError
from trainkit.runs.directory import Run
from trainkit.runs.frozen import FrozenWeights, with_frozen
from trainkit.runs.rank_states import state_of_rank, with_other_ranks
from trainkit.runs.sharded_checkpoint import INDEX, take_shards, write_shards
from trainkit.runs.snapshot import capture_state, restore_hooks, restore_state, restore_weights
from trainkit.training.finite import nonfinite_metric
from trainkit.training.state import State

LARGE = 1 << 24  # bytes; a thread writes a state from this size on. A smaller one takes milliseconds


class Restorer:
    """Undoes what other hooks do to a resumed training in their `on_start`.

    Args:
        saved: the state to restore, from `snapshot.capture_state`.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self.saved: Mapping[str, Any] | None = saved

    def on_start(self, state: State) -> None:
        """Restore the state once more, and free the saved one."""
        if self.saved is not None:
            restore_hooks(state, self.saved)  # first, because it may draw random numbers
            restore_state(state, with_frozen(state.objects.model, self.saved))
        self.saved = None


class Saver:
    """Writes the checkpoints of a run, and rolls back to the newest one.

    A checkpoint is written at the start (so that every run can be resumed), after each `every_epochs` epochs,
    `every_steps` steps and `every_minutes` minutes, after each new best epoch, at the end, and when a signal
    stops the run. Only rank 0 writes; the other ranks take part, because a checkpoint holds their RNG states.

    With `checkpoint.async`, by default for large states, the training goes on while a thread writes a copy of the
    state. The next save, a rollback and the end wait for the thread, so a checkpoint is never behind by more than one
    save.

    Args:
        checkpoints: the checkpoints of the run.
        options: the `checkpoint` settings.
        fingerprint: what the numbers of the run depend on.
        run: the run of the checkpoints.
        first: save at the start: the run is new, or its config has changed.
        frozen: the weights that the checkpoints do not hold.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        options: CheckpointSettings,
        fingerprint: Mapping[str, Any],
        run: Run,
        *,
        first: bool = True,
        frozen: FrozenWeights | None = None,
    ) -> None:
        self.checkpoints, self.options, self.fingerprint = checkpoints, options, fingerprint
        self.run, self.first, self.frozen = run, first, frozen
        self.saved_at = time.monotonic()
        self.background = Background()
        self.pending: str | None = None  # the checkpoint that the thread of rank 0 writes

    def on_start(self, state: State) -> None:
        """Save the beginning; repair pointers that a killed process left behind.

        Raises:
            CheckpointError: the first checkpoint cannot be read back.
        """
        if self.first:
            name = self.save(state)
            self.collect(state, wait=True)
        with state.objects.ranks.together():
            if not state.objects.ranks.is_first:
                return
            if self.first:
                self.check_readable(name)
            elif checkpoint_name(state.progress.step) in self.checkpoints.names():
                self.checkpoints.set_pointer("last", checkpoint_name(state.progress.step))
            self.point_to_best(state.progress.best)

    def check_readable(self, name: str) -> None:
        """Raise `CheckpointError` if a checkpoint cannot be read back. So it is reported now, not at the resume."""
        try:
            self.checkpoints.load(name)
        except DamagedError as error:
            hint = "let each state_dict contain numbers, strings, tensors, lists and dicts, or write checkpoint=off"
            raise CheckpointError(f"the checkpoint cannot be read back: {error}", hint=hint) from error

    def on_step(self, state: State) -> None:
        """Save if it is time. After the last batch of an epoch, `on_epoch_end` does it.

        If the training ends inside an epoch, save the open epoch, so that a longer run continues it exactly.
        """
        progress = state.progress
        self.collect(state, wait=False)
        if progress.batch >= progress.batches:
            return
        planned = self.step_is_planned(state)
        ends = state.ends_inside_epoch and math.isfinite(progress.loss.item())
        if planned or ends or self.minutes_are_over(state):
            self.save(state, planned=planned)  # a longer run does not plan to save at its former end

    def on_epoch_end(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Save if it is time, if the epoch is the best so far, or if it is the last one."""
        if nonfinite_metric(state, metrics) is not None:  # the training is about to end with an error
            return
        if state.progress.is_provisional:  # `on_step` has saved the open epoch; the best one before it is kept too
            self.collect(state, wait=True)
            if state.objects.ranks.is_first:
                self.point_to_best(state.progress.best)
            return
        every, best = self.options.every_epochs, state.progress.best
        is_best = best is not None and best["epoch"] == metrics["epoch"]
        planned = is_best or state.done or self.step_is_planned(state)
        planned |= every is not None and state.progress.epoch % every == 0
        if planned or self.minutes_are_over(state):
            self.save(state, planned=planned)

    def on_end(self, state: State) -> None:
        """Wait for the last checkpoint."""
        self.collect(state, wait=True)

    def step_is_planned(self, state: State) -> bool:
        """Return whether `every_steps` asks for a checkpoint of this step."""
        every = self.options.every_steps
        return every is not None and state.progress.step % every == 0

    def minutes_are_over(self, state: State) -> bool:
        """Return whether `every_minutes` asks for a checkpoint now, by the clock of rank 0."""
        every = self.options.every_minutes
        if every is None:
            return False
        return bool(state.objects.ranks.agree(time.monotonic() - self.saved_at >= 60 * every)[0][0])

    def point_to_best(self, best: Mapping[str, Any] | None) -> None:
        """Point `best` at the checkpoint of the best epoch, if it exists."""
        if best is not None:
            name = checkpoint_name(best["step"])
            if name in self.checkpoints.names() and self.checkpoints.is_valid(name):
                self.checkpoints.set_pointer("best", name)

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:  # noqa: ARG002
        """With `on_nonfinite=rollback`, restore the weights of the newest checkpoint; the data continues."""
        ranks = state.objects.ranks
        if state.settings.on_nonfinite == "rollback":
            self.collect(state, wait=True)
            name, whole, damaged = ranks.let_first(partial(self.checkpoints.newest, planned=True))
            saved = state_of_rank(whole, ranks.rank)
            restore_weights(state, with_frozen(state.objects.model, saved))
            restore_hooks(state, saved)
            if not ranks.is_first:
                return
            self.checkpoints.delete_after(name)  # a resume would continue from a discarded step
            skipped = "".join(f"; skipped {reason}" for reason in damaged)
            self.run.log(f"note: back to the weights of {name}{skipped}")

    def save(self, state: State, *, planned: bool = True) -> str:
        """Save now, with a copy of the history; return the name of the checkpoint. Only rank 0 writes, or its thread.

        Raises:
            RunDirectoryInUseError: another process may use the directory.
        """
        ranks, name = state.objects.ranks, checkpoint_name(state.progress.step)
        in_background = False
        with ranks.together():
            captured, shards = take_shards(capture_state(state, self.fingerprint))
        captured = with_other_ranks(captured, state.objects)
        self.collect(state, wait=True)
        with ranks.together():
            if ranks.is_first:
                self.run.lock.check()
                captured = captured if self.frozen is None else self.frozen.remove_from(captured)
                captured["history"] = self.run.history_text
                in_background = not shards and self.writes_in_background(captured)
                if in_background:
                    self.background.start(partial(self._write, copy_to_cpu(captured, shared={}), planned=planned))
                elif not shards:
                    self._write(captured, planned=planned)
        if shards:
            self._write_shards(captured, shards, ranks, planned=planned)
        self.saved_at, self.pending = time.monotonic(), name
        self.collect(state, wait=not in_background)
        return name

    def writes_in_background(self, captured: Mapping[str, Any]) -> bool:
        """Return whether a thread writes a state; by default if it is large, and the memory has room for its copy."""
        if self.options.async_ != "auto":
            return self.options.async_ is not None
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(captured))
        return LARGE <= size <= free_host_memory() / 4

    def collect(self, state: State, *, wait: bool) -> None:
        """Log the checkpoint that was written, or raise the error of its thread; with `wait`, wait for the thread.

        All ranks call this together.
        """
        if self.pending is None:
            return
        with state.objects.ranks.together() as agreement:
            agreement.offer(self.background.has_ended(wait=wait))
        if all(agreement.columns[0]):
            self.run.log(f"saved {self.pending}")
            self.pending = None

    def abandon(self) -> None:
        """Wait for the thread after an error of the training, which matters more than an error of the thread."""
        with contextlib.suppress(Exception):
            self.background.has_ended(wait=True)

    def _write(self, saved: Mapping[str, Any], *, planned: bool) -> None:
        self.checkpoints.write(saved, planned=planned)
        self._after(saved)

    def _write_shards(
        self, captured: dict[str, Any], shards: Mapping[Any, Any], ranks: Ranks, *, planned: bool
    ) -> None:
        """Write a checkpoint to which each rank adds the shards that it holds."""
        pending = None
        with ranks.together():
            if ranks.is_first:
                pending = self.checkpoints.begin(captured, planned=planned)
        files: dict[str, Any] = {}
        if (folder := ranks.first(None if pending is None else pending.folder)) is not None:
            with ranks.together():
                try:
                    own, captured[INDEX] = write_shards(folder, shards, ranks)
                except StorageError:
                    self.checkpoints.discard(pending)
                    raise
            files = {name: facts for part in ranks.gather(own) for name, facts in part.items()}
        with ranks.together():
            if ranks.is_first:
                if pending is not None:
                    self.checkpoints.finish(pending, captured, files)
                self._after(captured)

    def _after(self, saved: Mapping[str, Any]) -> None:
        """Point at the best checkpoint, and delete old ones."""
        self.point_to_best(saved["best"])
        self.checkpoints.prune(self.options.keep)

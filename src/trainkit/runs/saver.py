"""The hooks that write checkpoints and go back to them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from trainkit.config.schema import CheckpointSettings
from trainkit.core.errors import CheckpointError, NonFiniteError, StorageError
from trainkit.runs.checkpoint import Checkpoints, checkpoint_name
from trainkit.runs.checkpoint_files import DamagedError
from trainkit.runs.directory import Run
from trainkit.runs.frozen import FrozenWeights, with_frozen
from trainkit.runs.rank_states import state_of_rank, with_other_ranks
from trainkit.runs.sharded_checkpoint import INDEX, take_shards, write_shards
from trainkit.runs.snapshot import capture_state, restore_hooks, restore_state, restore_weights
from trainkit.training.finite import nonfinite_metric
from trainkit.training.state import State


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

    def on_start(self, state: State) -> None:
        """Save the beginning; repair pointers that a killed process left behind.

        Raises:
            CheckpointError: the first checkpoint cannot be read back.
        """
        if self.first:
            name = self.save(state)
        with state.objects.ranks.together():
            if not state.objects.ranks.is_first:
                return
            if self.first:
                self.check_readable(name)
            elif checkpoint_name(state.progress.step) in self.checkpoints.names():
                self.checkpoints.set_pointer("last", checkpoint_name(state.progress.step))
            self.point_to_best(state)

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
            if state.objects.ranks.is_first:
                self.point_to_best(state)
            return
        every, best = self.options.every_epochs, state.progress.best
        is_best = best is not None and best["epoch"] == metrics["epoch"]
        planned = is_best or state.done or self.step_is_planned(state)
        planned |= every is not None and state.progress.epoch % every == 0
        if planned or self.minutes_are_over(state):
            self.save(state, planned=planned)

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

    def point_to_best(self, state: State) -> None:
        """Point `best` at the checkpoint of the best epoch, if it exists."""
        if state.progress.best is not None:
            name = checkpoint_name(state.progress.best["step"])
            if name in self.checkpoints.names() and self.checkpoints.is_valid(name):
                self.checkpoints.set_pointer("best", name)

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:  # noqa: ARG002
        """With `on_nonfinite=rollback`, restore the weights of the newest checkpoint; the data continues."""
        ranks = state.objects.ranks
        if state.settings.on_nonfinite == "rollback":
            with ranks.together():
                found = self.checkpoints.newest(planned=True) if ranks.is_first else ("", {}, [])
            name, whole, damaged = ranks.first(found)
            saved = state_of_rank(whole, ranks.rank)
            restore_weights(state, with_frozen(state.objects.model, saved))
            restore_hooks(state, saved)
            if not ranks.is_first:
                return
            self.checkpoints.delete_after(name)  # a resume would continue from a discarded step
            skipped = "".join(f"; skipped {reason}" for reason in damaged)
            self.run.log(f"note: back to the weights of {name}{skipped}")

    def save(self, state: State, *, planned: bool = True) -> str:
        """Write a checkpoint now, with a copy of the history; return its name. Only rank 0 writes.

        Raises:
            RunDirectoryInUseError: another process may use the directory.
        """
        ranks, pending = state.objects.ranks, None
        with ranks.together():
            captured, shards = take_shards(capture_state(state, self.fingerprint))
        captured = with_other_ranks(captured, state.objects)
        with ranks.together():
            if ranks.is_first:
                self.run.lock.check()
                captured = captured if self.frozen is None else self.frozen.remove_from(captured)
                captured["history"] = self.run.history_text
                pending = self.checkpoints.begin(captured, planned=planned)
        files: dict[str, Any] = {}
        if shards and (folder := ranks.first(None if pending is None else pending.folder)) is not None:
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
                self._after(state, checkpoint_name(state.progress.step))
        self.saved_at = time.monotonic()
        return checkpoint_name(state.progress.step)

    def _after(self, state: State, name: str) -> None:
        """Point at the best checkpoint, and delete old ones."""
        self.point_to_best(state)
        self.checkpoints.prune(self.options.keep)
        self.run.log(f"saved {name}")

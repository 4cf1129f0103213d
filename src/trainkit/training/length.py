"""The length of a training: where it ends, by epochs, steps, time or early stopping."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainkit.training.objects import Objects
    from trainkit.training.progress import Progress
    from trainkit.training.state import LoopSettings


class Length:
    """The part of a `State` that says where the training ends."""

    settings: LoopSettings
    progress: Progress
    objects: Objects

    @property
    def done(self) -> bool:
        """Whether the training has reached its end, and its last epoch is closed."""
        progress, epochs = self.progress, self.settings.epochs
        return (
            (epochs is not None and progress.epoch >= epochs)
            or self.stopped_early
            or (self.at_limit and progress.batch == 0)
        )

    @property
    def at_limit(self) -> bool:
        """Whether `steps` or `max_minutes` allows no further step."""
        steps = self.settings.steps
        return self.progress.out_of_time or (steps is not None and self.progress.step >= steps)

    @property
    def ends_inside_epoch(self) -> bool:
        """Whether the training ends before the last batch of its epoch, which a longer run would continue."""
        return self.at_limit and 0 < self.progress.batch < self.progress.batches

    @property
    def planned_batches(self) -> int:
        """Batches of this epoch, unless the time runs out or batches are skipped."""
        progress, steps = self.progress, self.settings.steps
        return progress.batches if steps is None else min(progress.batches, progress.batch + steps - progress.step)

    @property
    def in_last_batch(self) -> bool:
        """Whether the current batch may be the last of its epoch. With `max_minutes`, any batch may be."""
        progress, settings = self.progress, self.settings
        return (
            progress.in_last_batch
            or (settings.steps is not None and progress.step + 1 >= settings.steps)
            or settings.max_minutes is not None
        )

    def check_time(self) -> None:
        """Note whether the training has taken `max_minutes`."""
        minutes = self.settings.max_minutes
        if minutes is not None:
            is_over = self.progress.training_seconds >= 60 * minutes
            self.progress.out_of_time = bool(self.objects.ranks.agree(is_over)[0][0])  # the clock of rank 0 decides

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has ended the training."""
        patience = self.settings.patience
        return patience is not None and self.progress.epochs_since_best >= patience

    @property
    def epochs(self) -> int | None:
        """Epochs of the whole training, the last of which may be short; None: only `max_minutes` ends it."""
        progress, settings = self.progress, self.settings
        if settings.steps is None:
            return settings.epochs
        return progress.epoch + -(-(progress.batch + settings.steps - progress.step) // max(1, progress.batches))

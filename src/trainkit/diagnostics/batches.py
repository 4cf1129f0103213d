"""Batches beyond the end of an epoch, for measurements of a fixed number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.data.wrapped_loader import WrappedLoader


def endless_batches(loader: Loader) -> Iterator[Batch]:
    """Yield the batches of epoch 0, 1, 2, … without end."""
    epoch = 0
    while True:
        yield from loader.batches(epoch)
        epoch += 1


class FixedStepsLoader(WrappedLoader):
    """A loader whose epochs have `steps` batches each. Each epoch continues the data where the last epoch ended."""

    def __init__(self, loader: Loader, steps: int) -> None:
        super().__init__(loader)
        self.steps = steps
        self._batches = endless_batches(loader)

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:  # noqa: ARG002
        """Yield the next `steps` batches."""
        return (next(self._batches) for _ in range(self.steps))

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:  # noqa: ARG002
        """Return a general name, because the samples of a batch are not known here."""
        return "one of the timed batches"

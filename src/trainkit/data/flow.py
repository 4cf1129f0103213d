"""Epochs of a fixed number of batches: the data flows on from epoch to epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.data.wrapped_loader import WrappedLoader


class FlowingLoader(WrappedLoader):
    """A loader whose epochs have `steps` batches each, out of an endless sequence of passes over another loader.

    Epoch e has the batches e * steps to (e + 1) * steps - 1 of the sequence. With L batches in a pass, batch g of the
    sequence is batch g % L of pass g // L. The number of the pass decides the order and the augmentation.

    Args:
        loader: its epochs are the passes.
        steps: batches of an epoch.
    """

    def __init__(self, loader: Loader, steps: int) -> None:
        super().__init__(loader)
        self.steps = steps
        self._open: tuple[int, Iterator[Batch]] | None = None  # the rest of a pass, and the batch it begins with

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`. A pass that an epoch leaves open is continued, so that workers read ahead."""
        batch, end = epoch * self.steps + start, (epoch + 1) * self.steps
        while batch < end:
            following, self._open = self._rest_of_pass(batch), None
            for pair in following:
                batch += 1
                self._open = batch, following
                yield pair
                if batch == end:
                    return
                self._open = None  # an iterator that raises an error is not continued

    def _rest_of_pass(self, batch: int) -> Iterator[Batch]:
        """Return the batches from `batch` to the end of its pass."""
        if self._open is not None and self._open[0] == batch:
            return self._open[1]
        number, first = divmod(batch, len(self.loader))
        return self.loader.batches(number, first)

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        number, first = divmod(epoch * self.steps + batch, len(self.loader))
        return self.loader.describe(number, first, inputs)

    def close(self) -> None:
        """See `Loader.close`."""
        self._open = None
        super().close()

"""A loader around another loader, whose epochs a subclass changes."""

from __future__ import annotations

from typing import Any

from trainkit.data.loaders import Loader
from trainkit.data.pairs import Pair
from trainkit.data.prepare import Batch, Prepare


class WrappedLoader:
    """The parts of a `Loader` that belong to the data. A subclass has `__len__` and `batches`.

    Args:
        loader: the other loader.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.samples, self.unreadable, self.dataset = loader.samples, loader.unreadable, loader.dataset

    @property
    def prepare(self) -> Prepare:
        """See `Loader`."""
        return self.loader.prepare

    @prepare.setter
    def prepare(self, prepare: Prepare) -> None:
        self.loader.prepare = prepare

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        return self.loader.describe(epoch, batch, inputs)

    def example(self) -> Batch:
        """See `Loader.example`."""
        return self.loader.example()

    def raw_example(self) -> Pair:
        """See `Loader.raw_example`."""
        return self.loader.raw_example()

    def close(self) -> None:
        """See `Loader.close`."""
        self.loader.close()

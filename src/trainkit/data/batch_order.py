"""The order of the samples in an epoch, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.core.pytree import batch_size_of, tensors_in
from trainkit.data.reading import epoch_seed, name_of

NO_SAMPLES_TEXT = "no samples"  # of an empty share
EpochOrder = Callable[[int], Tensor]  # epoch, from 0 -> the indices of its samples, (N,) int64


@dataclass(frozen=True)
class Share:
    """The part of each batch that one of several processes reads: a range of its samples.

    The sizes of the shares of a batch differ by at most one sample.

    Args:
        rank: the number of the process, from 0.
        ranks: the number of processes.
        with_previous: read the sample before the share, too. Before the first sample of a batch is the last one.
    """

    rank: int = 0
    ranks: int = 1
    with_previous: bool = False

    def of(self, batch: Tensor) -> Tensor:
        """Return the share of a batch."""
        return batch[self.bounds(len(batch))]

    def read_of(self, batch: Tensor) -> Tensor:
        """Return what the process reads of a batch: its share, after the sample before it with `with_previous`."""
        return batch[self.positions(len(batch))] if self.with_previous else self.of(batch)

    def positions(self, samples: int) -> list[int]:
        """Return the places in a batch of the samples that the process reads, see `read_of`."""
        bounds = self.bounds(samples)
        share = [*range(bounds.start, bounds.stop)]
        return [(bounds.start - 1) % samples, *share] if self.with_previous and share else share

    def bounds(self, samples: int) -> slice:
        """Return the range of the share in a batch."""
        return slice(self.rank * samples // self.ranks, (self.rank + 1) * samples // self.ranks)

    def size(self, samples: int) -> int:
        """Return the number of samples of the share in a batch."""
        bounds = self.bounds(samples)
        return int(bounds.stop - bounds.start)


WHOLE = Share()


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch: a permutation, (samples,) int64, made from (seed, epoch) alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))


@dataclass
class BatchOrder:
    """The indices of each batch of an epoch, a batch sampler for `DataLoader`. The loader sets epoch and start.

    Without a seed, samples keep the order of the data set. If `limit` leaves samples out, the epoch is a random
    sample of the whole set, the same in each epoch and run: data sets are often sorted by class.

    Args:
        samples: the number of samples in the data set.
        batch_size: samples per batch.
        limit: the maximum number of samples in an epoch.
        seed: the seed of the order and of random samples.
        custom: returns the order of an epoch, instead of a permutation. Its length is the same in every epoch.
        drop_last: leave out the last batch if it is smaller.
        share: which samples of each batch this process reads.
    """

    samples: int
    batch_size: int
    limit: int | None
    seed: int | None
    custom: EpochOrder | None = None
    drop_last: bool = False
    share: Share = WHOLE
    epoch: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        count = self.samples if self.custom is None else len(self.custom(0))
        count = count if self.limit is None else min(count, self.limit)
        self.total = count - count % self.batch_size if self.drop_last else count  # samples of an epoch

    def __len__(self) -> int:
        return -(-self.total // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.batches():
            if len(indices):
                yield [(self.epoch, index) for index in indices.tolist()]

    def batches(self, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yield the indices that this process reads of each batch from `start` on, (samples,) int64."""
        return map(self.share.read_of, self._whole_batches(device))

    def _whole_batches(self, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yield the indices of each batch from `start` on."""
        order = self._order()[: self.total].to(device)
        for batch in range(self.start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def share_sizes(self) -> list[int]:
        """Return the number of samples of this process's share of each batch from `start` on."""
        starts = range(self.start * self.batch_size, self.total, self.batch_size)
        return [self.share.size(min(self.batch_size, self.total - start)) for start in starts]

    def _order(self) -> Tensor:
        if self.custom is not None:
            return self.custom(self.epoch)
        if self.seed is not None:
            return epoch_order(self.samples, self.seed, self.epoch)
        if self.total >= self.samples:
            return torch.arange(self.samples)
        return epoch_order(self.samples, seed=0, epoch=0)[: self.total].sort().values

    def describe(self, dataset: Any, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        self.epoch, self.start = epoch, batch
        indices = self.share.of(next(self._whole_batches())).tolist()
        if not indices:
            return NO_SAMPLES_TEXT
        shown = ", ".join(name_of(dataset, index).removeprefix("sample ") for index in indices[:8])
        text = f"samples {shown}" + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
        bad = non_finite_rows(inputs)
        if bad and batch_size_of(inputs) == len(indices):
            names = ", ".join(name_of(dataset, indices[row]) for row in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            return f"{text}; the inputs of {names}{more} are not finite"
        return text


def non_finite_rows(inputs: Any) -> list[int]:
    """Return the rows of a batch whose inputs are not finite."""
    rows: set[int] = set()
    for tensor in tensors_in(inputs):
        if tensor.is_floating_point() and tensor.dim():
            rows.update((~tensor.unsqueeze(-1).flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist())
    return sorted(rows)

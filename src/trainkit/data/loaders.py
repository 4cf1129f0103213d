"""From a data set to batches on the device: the order of an epoch, and the loaders.

A data set has a length and gives `(inputs, target)` for an index. One whose samples lie in tensors
(`TensorDataset`, or any other that `cache` holds) is sliced; every other streams through torch's
`DataLoader`. Both give the same batches: the order depends on (seed, epoch), what a sample draws at
random on (seed, epoch, sample) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from trainkit.core.errors import DataError
from trainkit.core.pytree import batch_size_of, map_tensors, tensors_in
from trainkit.data.prepare import Batch, Prepare
from trainkit.data.reading import SeededReader, collate, epoch_seed, leave_signals_to_parent, name_of

MAX_UNREADABLE = 10  # samples that data.on_unreadable=skip leaves out, or 1 in 100 of the set


class Loader(Protocol):
    """What the loop knows of data."""

    samples: int
    unreadable: dict[int, str]  # samples left out, each with why
    prepare: Prepare

    def __len__(self) -> int:
        """How many batches an epoch has."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """`(inputs, targets)` on the device, of epoch `epoch` (from 0) from batch `start` on."""

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """Which samples a batch of an epoch holds, and which of them have inputs that are not finite."""

    def example(self) -> Batch:
        """One sample, twice, as the model will get it."""

    def close(self) -> None:
        """End whatever reads data in the background."""


# ------------------------------------------------------------------------------------------- loaders


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation (samples,) int64 made from (seed, epoch) alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))


@dataclass
class Order:
    """The indices of each batch of an epoch, for `DataLoader`; the loader sets epoch and start."""

    samples: int
    batch_size: int
    limit: int | None
    seed: int | None
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        count = -(-self.samples // self.batch_size)
        return count if self.limit is None else min(count, self.limit)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.batches():
            yield [(self.epoch, index) for index in indices.tolist()]

    def batches(self, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The indices of each batch from `start` on, (batch_size,) int64."""
        if self.seed is None:
            order = torch.arange(self.samples)
        else:
            order = epoch_order(self.samples, self.seed, self.epoch)
        order = order.to(device)
        for batch in range(self.start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def describe(self, dataset: Any, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader`."""
        self.epoch, self.start = epoch, batch
        indices = next(self.batches()).tolist()
        shown = ", ".join(name_of(dataset, index).removeprefix("sample ") for index in indices[:8])
        text = f"samples {shown}" + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
        bad = _not_finite_rows(inputs)
        if bad and batch_size_of(inputs) == len(indices):
            names = ", ".join(name_of(dataset, indices[row]) for row in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            return f"{text}; the inputs of {names}{more} are not finite"
        return text


def _not_finite_rows(inputs: Any) -> list[int]:
    rows: set[int] = set()
    for tensor in tensors_in(inputs):
        if tensor.is_floating_point() and tensor.dim():
            rows.update((~tensor.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist())
    return sorted(rows)


class CachedDataset(Dataset[Any]):
    """A data set whose samples were read into tensors; images lie with channels last.

    Attributes:
        tensors: inputs and targets, a tensor each, or tuples, lists and mappings of them.
        held_from: the data set that was read.
        missing: samples that could not be read, each with why.
        decoded: they came from a file that an earlier run has left.
    """

    def __init__(
        self, source: Any, inputs: Any, targets: Any, missing: dict[int, str], *, decoded: bool = False
    ) -> None:
        self.tensors = inputs, targets
        self.cached_from, self.missing, self.decoded = source, missing, decoded

    def __len__(self) -> int:
        return batch_size_of(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return map_tensors(self.tensors, lambda tensor: tensor[index])


class SlicingLoader:
    """Batches sliced out of tensors, in memory or on the accelerator.

    Args:
        dataset: whose samples lie in tensors, for `in_tensors`.
        order: of the batches.
        prepare: brings a batch onto the device.
        device: where the tensors are to lie.
    """

    def __init__(self, dataset: Any, order: Order, prepare: Prepare, device: torch.device | str = "cpu") -> None:
        self.dataset, self.order, self.prepare, self.device = dataset, order, prepare, device
        inside = in_tensors(dataset)
        assert inside is not None
        whole, rows = inside
        self.tensors = self.inputs, self.targets = map_tensors(tuple(whole.tensors), lambda tensor: tensor.to(device))
        self.rows = None if rows is None else rows.to(device)  # those of the tensors that are in the set
        self.unreadable: dict[int, str] = {}
        missing = whole.missing if isinstance(whole, CachedDataset) else {}
        places = range(len(whole)) if rows is None else rows.tolist()
        self.missing = {place: missing[row] for place, row in enumerate(places) if row in missing} if missing else {}
        self.samples = min(order.samples, len(order) * order.batch_size)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        self.order.epoch, self.order.start = epoch, start
        for indices in self.order.batches(self.device):
            there = self._readable(indices) if self.missing else indices
            rows = there if self.rows is None else self.rows[there]
            yield self.prepare(take(self.inputs, rows), take(self.targets, rows), epoch, there)

    def _readable(self, indices: Tensor) -> Tensor:
        """The indices without those of samples that could not be read, which are noted."""
        lost = [index for index in indices.tolist() if index in self.missing]
        for index in lost:
            record_unreadable_sample(self.unreadable, self.dataset, index, self.missing[index])
        if len(lost) == len(indices):
            raise no_readable_in_batch(self.unreadable)
        return indices[[index not in self.missing for index in indices.tolist()]] if lost else indices

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader`."""
        return self.order.describe(self.dataset, epoch, batch, inputs)

    def example(self) -> Batch:
        """See `Loader`."""
        place = next((place for place in range(self.order.samples) if place not in self.missing), None)
        if place is None:
            raise no_readable_sample(self.dataset, 0, self.missing[0])
        row = place if self.rows is None else int(self.rows[place])
        rows = torch.tensor([row, row], device=self.device)
        return self.prepare(take(self.inputs, rows), take(self.targets, rows))

    def close(self) -> None:
        """There is nothing to end."""


def in_tensors(dataset: Any) -> tuple[TensorDataset | CachedDataset, Tensor | None] | None:
    """The tensors that a data set's samples are slices of, and which rows of them (None: all); None: it has others.

    A subclass with a `__getitem__` of its own may do more to them than to slice.
    """
    rows = None
    while type(dataset) is Subset:
        own = torch.from_numpy(np.asarray(dataset.indices, dtype=np.int64))
        own = torch.where(own < 0, own + len(dataset.dataset), own)  # type: ignore[arg-type]  # it has a length
        rows, dataset = own if rows is None else own[rows], dataset.dataset
    plain = getattr(type(dataset), "__getitem__", None) in (TensorDataset.__getitem__, CachedDataset.__getitem__)
    return (dataset, rows) if plain and len(dataset.tensors) == 2 else None


def take(whole: Any, rows: Tensor) -> Any:
    """Some rows of tensors, laid out as they are there: images with channels last stay so."""

    def of_one(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and not tensor.is_contiguous():
            return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        return tensor.index_select(0, rows)

    return map_tensors(whole, of_one)


def record_unreadable_sample(known: dict[int, str], dataset: Any, index: int, why: str) -> None:
    """Leave out a sample, and say why.

    Raises:
        DataError: there are too many.
    """
    text = f"{name_of(dataset, index)}: {why}"
    known[index] = text
    most = max(MAX_UNREADABLE, len(dataset) // 100)
    if len(known) > most:
        raise DataError(
            f"{len(known)} of {len(dataset)} samples cannot be read, {most} may be left out; {text}",
            hint="mend or delete those files: trainkit.log names the others",
        )


def unreadable_sample(dataset: Any, index: int, why: str) -> DataError:
    """What to say of a sample that cannot be read and may not be left out."""
    hint = "mend or delete it, or leave out such samples: data.on_unreadable=skip"
    return DataError(f"{name_of(dataset, index)}: {why}", hint=hint)


def no_readable_sample(dataset: Any, index: int, why: str) -> DataError:
    """What to say of a data set of which no sample can be read."""
    cause = f"no sample can be read: the first is {name_of(dataset, index)}: {why}"
    return DataError(cause, hint="mend the files of the data set")


def no_readable_in_batch(known: dict[int, str]) -> DataError:
    """What to say of a batch without samples."""
    return DataError(
        "no sample of a batch can be read: the first is " + next(reversed(known.values())),
        hint="mend those files, or take a larger batch_size",
    )


class StreamingLoader:
    """Batches read sample by sample through torch's `DataLoader`, in worker processes if asked for.

    Args:
        dataset: with a length and items.
        order: of the batches.
        prepare: brings a batch onto the device.
        num_workers: processes that read samples.
        skip: leave out samples that cannot be read, up to `MOST_UNREADABLE`; they are kept in `unreadable`.
        alike: see `Seeded`.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        prepare: Prepare,
        num_workers: int = 0,
        *,
        skip: bool = False,
        alike: bool = False,
    ) -> None:
        self.dataset, self.order, self.prepare, self.skip = dataset, order, prepare, skip
        self.unreadable: dict[int, str] = {}
        self.samples = min(order.samples, len(order) * order.batch_size)
        seeded: Dataset[Any] = SeededReader(dataset, order.seed or 0, skip=skip, alike=alike)  # type: ignore[assignment]
        self.loader = DataLoader(
            seeded,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,  # type: ignore[arg-type]  # it takes what `Seeded` gives
            worker_init_fn=leave_signals_to_parent,
            pin_memory=prepare.device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # its own: reading data must not move the model's random numbers
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        self.order.epoch, self.order.start = epoch, start
        return self._prepared(iter(self.loader), epoch)  # worker processes start here, where nothing interrupts

    def _prepared(self, fetched: Iterator[Any], epoch: int) -> Iterator[Batch]:
        for inputs, targets, indices, unreadable in fetched:
            for index, why in unreadable:
                if not self.skip:
                    raise unreadable_sample(self.dataset, index, why)
                record_unreadable_sample(self.unreadable, self.dataset, index, why)
            if inputs is None:
                raise no_readable_in_batch(self.unreadable)
            yield self.prepare(inputs, targets, epoch, torch.tensor(indices))

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader`."""
        return self.order.describe(self.dataset, epoch, batch, inputs)

    def example(self) -> Batch:
        """See `Loader`."""
        reader = SeededReader(self.dataset, self.order.seed or 0, skip=self.skip)
        first: tuple[int, str] | None = None
        for index in range(len(self.dataset)):
            read = reader.__getitems__([(0, index)])
            inputs, targets, _, unreadable = collate(replace(read, samples=2 * read.samples, indices=2 * read.indices))
            if inputs is not None:
                return self.prepare(inputs, targets)
            first = first or unreadable[0]
        assert first is not None
        raise no_readable_sample(self.dataset, *first)

    def close(self) -> None:
        """End the worker processes, whatever they are at."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter) and iterator._worker_pids_set:
            _remove_worker_pids(id(iterator))  # or torch takes their end for a fault
            iterator._worker_pids_set = False
            for worker in iterator._workers:
                worker.kill()
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.join(timeout=5)


def make_loader(
    dataset: Any,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int | None,
    num_workers: int = 0,
    limit_batches: int | None = None,
    skip: bool = False,
    stream: bool = False,
    device: torch.device | str = "cpu",
) -> Loader:
    """The loader that suits a data set.

    Args:
        dataset: one in tensors is sliced; anything else with a length and items streams.
        prepare: brings a batch onto the device.
        batch_size: samples of a batch; the last may be shorter.
        seed: of the order; None keeps the data set's own.
        num_workers: processes that read samples.
        limit_batches: most batches of an epoch.
        skip: leave out samples that cannot be read.
        stream: whatever it is.
        device: where tensors are to lie from which batches are sliced.
    """
    order = Order(len(dataset), batch_size, limit_batches, seed)
    if in_tensors(dataset) and not stream:
        return SlicingLoader(dataset, order, prepare, device)
    return StreamingLoader(dataset, order, prepare, num_workers, skip=skip)

"""From a store to batches on the device.

Tensors are sliced; a streamed store is read through torch's `DataLoader`. Both give the same batches: the order
depends on (seed, epoch), the random numbers of a sample on (seed, epoch, sample).
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing.util
import operator
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from trainkit.core.signals import delay_signals
from trainkit.data.batch_order import WHOLE, BatchOrder, EpochOrder, Share, epoch_order
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.pairs import Pair, map_pair
from trainkit.data.prepare import NO_SAMPLES, Batch, Prepare
from trainkit.data.reading import CollatedBatch, SeededReader, collate, ignore_signals
from trainkit.data.sample_errors import sample_error
from trainkit.data.store import Store
from trainkit.data.unreadable import (
    record_unreadable_sample,
    unreadable_batch_error,
    unreadable_sample_error,
    unreadable_set_error,
)

__all__ = ["Loader", "SlicingLoader", "StreamingLoader", "end_workers", "epoch_order", "make_loader", "take_rows"]


class Loader(Protocol):
    """The batches of a data set, for the loop.

    Attributes:
        samples: in a pass over the data; None: a stream without a length.
        unreadable: index of a skipped sample -> its name and why it could not be read.
        prepare: moves a batch to the device.
        dataset: has a length and items, or is a stream.
    """

    samples: int | None
    unreadable: dict[int, str]
    prepare: Prepare
    dataset: Any

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield `(inputs, targets)` on the device, of an epoch (from 0), from batch `start` on.

        If several processes share each batch, this is the share of one of them, or `NO_SAMPLES`.
        """

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """Return the names of a batch's samples, and of those whose inputs are not finite."""

    def example(self) -> Batch:
        """Return a batch that holds one sample twice, as the model receives it."""

    def raw_example(self) -> Pair:
        """Return the batch of `example` before its preparation. It is read once; do not change it."""

    def close(self) -> None:
        """End the processes that read data."""


def make_loader(
    store: Store,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int | None,
    num_workers: int = 0,
    limit_batches: int | None = None,
    limit_batch_size: int | None = None,
    skip: bool = False,
    order: EpochOrder | None = None,
    drop_last: bool = False,
    share: Share = WHOLE,
) -> Loader:
    """Return the loader of a store.

    Args:
        store: tensors are sliced, anything else streams.
        prepare: moves a batch to the device.
        batch_size: samples per batch; the last batch may be shorter.
        seed: the seed of the order; None keeps the order of the data set, see `BatchOrder`.
        num_workers: processes that read samples.
        limit_batches: the maximum number of batches in an epoch.
        limit_batch_size: the size of the batches that the limit counts; None: `batch_size`.
        skip: skip samples that cannot be read.
        order: the order of an epoch, see `BatchOrder`.
        drop_last: leave out the last batch if it is smaller.
        share: which samples of each batch this process reads.
    """
    limit = None if limit_batches is None else limit_batches * (limit_batch_size or batch_size)
    batches = BatchOrder(len(store), batch_size, limit, seed, order, drop_last, share)
    if store.tensors is not None:
        return SlicingLoader(store, batches, prepare)
    return StreamingLoader(store.dataset, batches, prepare, num_workers, skip=skip, key=store.key, form=store.form)


# --------------------------------------------------------------------------------------- the loaders


class SlicingLoader:
    """Slices batches out of tensors, in memory or on the device.

    Args:
        store: a store with tensors.
        order: the order of the batches.
        prepare: moves a batch to the device.
    """

    def __init__(self, store: Store, order: BatchOrder, prepare: Prepare) -> None:
        assert store.tensors is not None
        self.store, self.order, self.prepare = store, order, prepare
        self.dataset, self.tensors = store.dataset, store.tensors
        self.rows = store.rows
        self.device = store.device
        self.unreadable: dict[int, str] = {}
        self.samples: int | None = order.total

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`."""
        self.order.epoch, self.order.start = epoch, start
        for indices in self.order.batches(self.device):
            if not len(indices):
                yield NO_SAMPLES
                continue
            readable = self._readable(indices) if self.store.unreadable else indices
            if not len(readable):
                yield NO_SAMPLES
                continue
            rows = readable if self.rows is None else self.rows[readable]
            yield self.prepare(*take_rows(self.tensors, rows), epoch, readable)

    def _readable(self, indices: Tensor) -> Tensor:
        """Return the indices of readable samples; record the others.

        Raises:
            DataError: the whole batch is unreadable, or too many samples are.
        """
        unreadable = [index for index in indices.tolist() if index in self.store.unreadable]
        for index in unreadable:
            record_unreadable_sample(self.unreadable, self.store.dataset, index, self.store.unreadable[index])
        if len(unreadable) == len(indices) and self.order.share.ranks == 1:
            raise unreadable_batch_error(self.unreadable)
        return indices[[index not in self.store.unreadable for index in indices.tolist()]] if unreadable else indices

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        return self.order.describe(self.store.dataset, epoch, batch, inputs)

    def example(self) -> Batch:
        """See `Loader.example`."""
        return self.prepare(*self.raw_example())

    def raw_example(self) -> Pair:
        """See `Loader.raw_example`."""
        unreadable = self.store.unreadable
        index = next((index for index in range(self.order.samples) if index not in unreadable), None)
        if index is None:
            raise unreadable_set_error(self.store.key, self.store.dataset, 0, unreadable[0])
        row = index if self.rows is None else int(self.rows[index])
        rows = torch.tensor([row, row], device=self.device)
        return take_rows(self.tensors, rows)

    def close(self) -> None:
        """Do nothing: no process reads data."""


def take_rows(pair: Pair, rows: Tensor) -> Pair:
    """Return some rows of inputs and targets. Images with channels last keep that memory format."""

    def of_tensor(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and not tensor.is_contiguous():
            return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        return tensor.index_select(0, rows)

    return map_pair(pair, of_tensor)


class StreamingLoader:
    """Reads batches sample by sample through torch's `DataLoader`, in worker processes if asked for.

    Args:
        dataset: has a length and items.
        order: the order of the batches.
        prepare: moves a batch to the device.
        num_workers: processes that read samples.
        skip: skip samples that cannot be read, up to `MAX_UNREADABLE`, and keep them in `unreadable`.
        constant: see `SeededReader`.
        key: the config key of the data set, for messages.
        form: which parts of a sample are the inputs and the targets, and how samples become a batch.
    """

    def __init__(
        self,
        dataset: Any,
        order: BatchOrder,
        prepare: Prepare,
        num_workers: int = 0,
        *,
        skip: bool = False,
        constant: bool = False,
        key: str = "data.train",
        form: SampleForm = PAIRS,
    ) -> None:
        self.dataset, self.order, self.prepare, self.skip, self.key = dataset, order, prepare, skip, key
        self.form = form
        self.unreadable: dict[int, str] = {}
        self.samples: int | None = order.total
        self._example: Pair | None = None
        reader: Dataset[Any] = SeededReader(  # type: ignore[assignment]
            dataset, order.seed or 0, skip=skip, constant=constant, form=form
        )
        self.loader = DataLoader(
            reader,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=functools.partial(collate, form=form),
            worker_init_fn=ignore_signals,
            pin_memory=prepare.device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # a separate generator: reading data must not advance the model's RNG
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`."""
        self.order.epoch, self.order.start = epoch, start
        fetched = start_reading(self.loader)
        return self._prepared(fetched, epoch, iter(self.order.share_sizes()))

    def _prepared(self, fetched: Iterator[CollatedBatch], epoch: int, sizes: Iterator[int]) -> Iterator[Batch]:
        for batch in fetched:
            for _ in itertools.takewhile(operator.not_, sizes):  # `BatchOrder` leaves out empty shares
                yield NO_SAMPLES
            for index, reason in batch.unreadable:
                if not self.skip:
                    raise unreadable_sample_error(self.key, self.dataset, index, reason)
                record_unreadable_sample(self.unreadable, self.dataset, index, reason)
            if batch.inputs is None:
                if self.order.share.ranks == 1:
                    raise unreadable_batch_error(self.unreadable)
                yield NO_SAMPLES  # other processes may have readable samples of the batch
                continue
            yield self.prepare(*batch.pair, epoch, batch.indices)
        for _ in sizes:
            yield NO_SAMPLES

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        return self.order.describe(self.dataset, epoch, batch, inputs)

    def example(self) -> Batch:
        """Return a batch that holds the first readable sample twice: batch norm needs two samples."""
        return self.prepare(*map_pair(self.raw_example(), Tensor.clone))

    def raw_example(self) -> Pair:
        """See `Loader.raw_example`."""
        if self._example is None:
            self._example = self._read_example()
        return self._example

    def _read_example(self) -> Pair:
        reader = SeededReader(self.dataset, self.order.seed or 0, skip=self.skip, form=self.form)
        first_failure: tuple[int, str] | None = None
        for index in range(len(self.dataset)):
            try:
                read = reader.__getitems__([(0, index)])
                batch = collate(replace(read, samples=2 * read.samples, indices=2 * read.indices), self.form)
            except Exception as error:
                raise sample_error(self.key, error) from error
            if batch.inputs is not None:
                return batch.pair
            first_failure = first_failure or batch.unreadable[0]
        assert first_failure is not None
        raise unreadable_set_error(self.key, self.dataset, *first_failure)

    def close(self) -> None:
        """End the worker processes, whatever they are doing."""
        iterator, self.loader._iterator = self.loader._iterator, None
        end_workers(iterator)


def start_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return the batches of torch's `DataLoader`, after the start of its worker processes."""
    if loader.num_workers:
        # Workers that are ended leave their temporary folder, so they share that of this process.
        multiprocessing.util.get_temp_dir()
    with delay_signals():
        return iter(loader)


def end_workers(iterator: Any) -> None:
    """End the worker processes of an iterator of torch's `DataLoader`, whatever they are doing."""
    if isinstance(iterator, _MultiProcessingDataLoaderIter) and iterator._worker_pids_set:
        _remove_worker_pids(id(iterator))  # otherwise torch reports the killed workers as an error
        iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()
        # A worker may have died with the lock of this event. Then `set`, which torch calls, would wait forever.
        unlocked: Any = threading.Event()
        iterator._workers_done_event = unlocked
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.join(timeout=5)

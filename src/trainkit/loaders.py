"""From a data set to batches on the device: the split, the order of an epoch, the loaders.

A data set has a length and gives `(inputs, target)` for an index. One whose samples lie in tensors
(`TensorDataset`) is sliced; every other streams through torch's `DataLoader`, where what a sample draws
at random depends on (seed, epoch, sample) alone. Images travel as uint8 and become floats from 0 to 1
on the device (`Prepare`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from trainkit.errors import DataError
from trainkit.samples import Seeded, collate, epoch_seed, leave_signals_to_parent, name_of

Batch = tuple[Any, Any]
MOST_UNREADABLE = 10  # samples that data.on_error=skip leaves out, or 1 in 100 of the set


class Loader(Protocol):
    """What the loop knows of data."""

    samples: int
    unreadable: dict[int, str]  # samples left out, each with why

    def __len__(self) -> int:
        """How many batches an epoch has."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """`(inputs, targets)` on the device, of epoch `epoch` (from 0) from batch `start` on."""

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """Which samples a batch of an epoch holds, and which of them have inputs that are not finite."""

    def close(self) -> None:
        """End whatever reads data in the background."""


# ------------------------------------------------------------------------------------- what a set is


def targets_of(dataset: Any) -> Tensor | None:
    """The classes of all samples, (N,) int64, where the data set tells without reading them."""
    targets = dataset.tensors[1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    if targets is None:
        return None
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):  # names, boxes: no classes to count
        return None
    return None if targets.is_floating_point() or targets.dim() != 1 else targets


def count_classes(dataset: Any) -> int | None:
    """How many classes a data set has: as it says itself, or by its largest target."""
    if hasattr(dataset, "classes"):
        return len(dataset.classes)
    targets = targets_of(dataset)
    return None if targets is None or not len(targets) else int(targets.max()) + 1


def split(dataset: Any, fraction: float) -> tuple[Any, Any]:
    """Hold out `fraction` of a data set, the same share of each class where it has classes.

    Which samples are held out depends on the data set alone, not on the run's seed: runs with other
    seeds are judged on the same samples.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    targets = targets_of(dataset)
    place = torch.empty(len(dataset), dtype=torch.float64)  # of a sample within its class, from 0 to 1
    for label in [None] if targets is None else sorted(set(targets.tolist())):
        members = order if targets is None else order[targets[order] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    held_out = torch.zeros(len(dataset), dtype=torch.bool)
    held_out[order[place[order].argsort(stable=True)[: round(fraction * len(dataset))]]] = True
    return _subset(dataset, ~held_out), _subset(dataset, held_out)


def in_tensors(dataset: Any) -> bool:
    """Whether a data set's samples are slices of its tensors (a subclass may do more to them)."""
    return getattr(type(dataset), "__getitem__", None) is TensorDataset.__getitem__


def _subset(dataset: Any, mask: Tensor) -> Any:
    indices = mask.nonzero().flatten().tolist()
    if not in_tensors(dataset):
        return Subset(dataset, indices)
    part = TensorDataset(*(tensor[mask] for tensor in dataset.tensors))
    part.indices = indices  # type: ignore[attr-defined]  # for `name_of`
    return part


# ------------------------------------------------------------------------------------------- loaders


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation (samples,) int64 made from (seed, epoch) alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with every tensor in it changed: a tensor, or tuples, lists and mappings of them."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def batch_size_of(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor.

    Raises:
        DataError: there is no tensor in it.
    """
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor) if tensor.dim() else 1)
        return tensor

    map_tensors(batch, note)
    if not sizes:
        raise DataError(f"the inputs are {type(batch).__name__}, with no tensor in them", mend="give tensors")
    return sizes[0]


def shape_of(batch: Any) -> str:
    """A batch's shape and type, for messages."""
    return f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__


@dataclass(frozen=True)
class Prepare:
    """The last step of a batch's way: onto the device, uint8 to floats from 0 to 1, normalised.

    Args:
        device: where the batch goes.
        mean: subtracted from the inputs: one number, or one a channel (dimension 1).
        std: what they are divided by then.
    """

    device: torch.device
    mean: Tensor | None = None
    std: Tensor | None = None

    def __call__(self, inputs: Any, targets: Any) -> Batch:
        """The batch as the model takes it."""
        return map_tensors(inputs, self._input), map_tensors(targets, self._move)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _input(self, tensor: Tensor) -> Tensor:
        tensor = self._move(tensor)
        if tensor.dtype == torch.uint8:
            tensor = tensor.to(torch.get_default_dtype()).div_(255)
        if self.mean is not None and self.std is not None:
            shape = (-1, *[1] * (tensor.dim() - 2))
            tensor = (tensor - self.mean.view(shape)) / self.std.view(shape)
        return tensor


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

    def batches(self) -> Iterator[Tensor]:
        """The indices of each batch from `start` on, (batch_size,) int64."""
        if self.seed is None:
            order = torch.arange(self.samples)
        else:
            order = epoch_order(self.samples, self.seed, self.epoch)
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

    def look(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dim():
            rows.update((~tensor.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist())
        return tensor

    map_tensors(inputs, look)
    return sorted(rows)


class SlicingLoader:
    """Batches sliced out of tensors in memory."""

    def __init__(self, dataset: TensorDataset, order: Order, prepare: Prepare) -> None:
        self.dataset, self.tensors, self.order, self.prepare = dataset, dataset.tensors, order, prepare
        self.unreadable: dict[int, str] = {}
        self.samples = min(order.samples, len(order) * order.batch_size)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        self.order.epoch, self.order.start = epoch, start
        for indices in self.order.batches():
            inputs, targets = (tensor[indices] for tensor in self.tensors)
            yield self.prepare(inputs, targets)

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader`."""
        return self.order.describe(self.dataset, epoch, batch, inputs)

    def close(self) -> None:
        """There is nothing to end."""


class StreamingLoader:
    """Batches read sample by sample through torch's `DataLoader`, in worker processes if asked for.

    Args:
        dataset: with a length and items.
        order: of the batches.
        prepare: brings a batch onto the device.
        num_workers: processes that read samples.
        skip: leave out samples that cannot be read, up to `MOST_UNREADABLE`; they are kept in `unreadable`.
    """

    def __init__(
        self, dataset: Any, order: Order, prepare: Prepare, num_workers: int = 0, *, skip: bool = False
    ) -> None:
        self.dataset, self.order, self.prepare, self.skip = dataset, order, prepare, skip
        self.unreadable: dict[int, str] = {}
        self.samples = min(order.samples, len(order) * order.batch_size)
        seeded: Dataset[Any] = Seeded(dataset, order.seed or 0, skip=skip)  # type: ignore[assignment]  # it is like one
        self.loader = DataLoader(
            seeded,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
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
        return self._prepared(iter(self.loader))  # worker processes start here, where nothing interrupts

    def _prepared(self, fetched: Iterator[Any]) -> Iterator[Batch]:
        for inputs, targets, unreadable in fetched:
            for index, why in unreadable:
                self._leave_out(index, why)
            if inputs is None:
                raise DataError(
                    "no sample of a batch can be read: the first is " + next(reversed(self.unreadable.values())),
                    mend="mend those files, or take a larger batch_size",
                )
            yield self.prepare(inputs, targets)

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader`."""
        return self.order.describe(self.dataset, epoch, batch, inputs)

    def _leave_out(self, index: int, why: str) -> None:
        text = f"{name_of(self.dataset, index)}: {why}"
        if not self.skip:
            raise DataError(f"{text}", mend="mend or delete it, or leave out such samples: data.on_error=skip")
        self.unreadable[index] = text
        most = max(MOST_UNREADABLE, len(self.dataset) // 100)
        if len(self.unreadable) > most:
            raise DataError(
                f"{len(self.unreadable)} of {len(self.dataset)} samples cannot be read, {most} may be left out; {text}",
                mend="mend or delete those files: trainkit.log names the others",
            )

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
) -> Loader:
    """The loader that suits a data set.

    Args:
        dataset: a `TensorDataset` is sliced; anything else with a length and items streams.
        prepare: brings a batch onto the device.
        batch_size: samples of a batch; the last may be shorter.
        seed: of the order; None keeps the data set's own.
        num_workers: processes that read samples.
        limit_batches: most batches of an epoch.
        skip: leave out samples that cannot be read.
    """
    order = Order(len(dataset), batch_size, limit_batches, seed)
    if in_tensors(dataset) and len(dataset.tensors) == 2:
        return SlicingLoader(dataset, order, prepare)
    return StreamingLoader(dataset, order, prepare, num_workers, skip=skip)

"""A `Store`: the samples of a data set, and the one decision where they are stored."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from trainkit.core.memory import format_bytes
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.pairs import Pair, map_pair, target_is_inputs, tensors_in_pair
from trainkit.data.sample_errors import NotAPairError


@dataclass(frozen=True)
class Store:
    """The samples of a data set: tensors in memory or on the device, or read one by one.

    Args:
        dataset: has a length and items. It names the samples, and reads them if `tensors` is None.
        tensors: inputs and targets of the whole data set, nested tensors whose rows are samples.
            None if the samples are streamed. Both are the same object if each target is its inputs.
        rows: the rows of `tensors` that belong to this store, (N,) int64. None: all rows, in order.
        unreadable: index of a sample in this store -> why it could not be read.
        note: why the samples are streamed, or more about samples in tensors; see `place`.
        key: the config key of the data set, for messages.
        form: which parts of a sample are the inputs and the targets, and how samples become a batch.
    """

    dataset: Any
    tensors: Pair | None = None
    rows: Tensor | None = None
    unreadable: Mapping[int, str] = field(default_factory=dict)
    note: str = ""
    key: str = "data.train"
    form: SampleForm = PAIRS

    @classmethod
    def of(cls, dataset: Any, form: SampleForm = PAIRS) -> Store:
        """Return a store that reads from a data set without copying.

        A `TensorDataset`, and subsets of it, are read from their tensors. Any other data set is read item by item,
        also a subclass of `TensorDataset` with its own `__getitem__`, which may change the samples.
        """
        rows, base = None, dataset
        while type(base) is Subset:
            indices = torch.from_numpy(np.asarray(base.indices, dtype=np.int64))
            length = len(base.dataset)  # type: ignore[arg-type]  # a data set with items has a length
            indices = torch.where(indices < 0, indices + length, indices)
            rows = indices if rows is None else indices[rows]  # rows of the inner data set
            base = base.dataset
        only_slices = getattr(type(base), "__getitem__", None) is TensorDataset.__getitem__
        if not only_slices or form.collate is not None:
            return cls(dataset, form=form)
        try:
            inputs, targets = form.pair(base.tensors, dataset)
        except NotAPairError:  # the first read of a sample reports it
            return cls(dataset, form=form)
        targets = inputs if target_is_inputs((inputs, targets)) else targets
        return cls(dataset, tensors=(inputs, targets), rows=rows, form=form)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; 0 if the samples are streamed."""
        return sum(tensor.nbytes for tensor in tensors_in_pair(self.tensors))

    @property
    def device(self) -> torch.device:
        """The device that holds the tensors; the CPU if the samples are streamed."""
        tensors = tensors_in_pair(self.tensors)
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def place(self) -> str:
        """Where the samples are stored, for people: "in memory (5.3 MiB)", or "streamed by 2 workers: ..."."""
        if self.tensors is None:
            return self.note
        where = "in memory" if self.device.type == "cpu" else f"on {self.device}"
        return f"{where} ({format_bytes(self.nbytes)}{self.note})"

    def to(self, device: torch.device) -> Store:
        """Return the store with its tensors on a device."""
        tensors = None if self.tensors is None else map_pair(self.tensors, lambda tensor: tensor.to(device))
        return replace(self, tensors=tensors, rows=None if self.rows is None else self.rows.to(device))

    def subset(self, mask: Tensor) -> Store:
        """Return the store of the samples where `mask`, (N,) bool, is true; it shares the tensors."""
        indices = mask.nonzero().flatten()
        # 8 bytes per sample, where a list takes 40.
        dataset = Subset(self.dataset, array("q", indices.numpy()))
        unreadable = {}
        if self.unreadable:
            kept = enumerate(indices.tolist())
            unreadable = {place: self.unreadable[index] for place, index in kept if index in self.unreadable}
        if self.tensors is None:
            return replace(self, dataset=dataset, unreadable=unreadable)
        chosen = indices if self.rows is None else self.rows.cpu()[indices]
        return replace(self, dataset=dataset, rows=chosen.to(self.device), unreadable=unreadable)

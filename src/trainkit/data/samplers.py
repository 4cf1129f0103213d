"""Samplers: the order of an epoch if it is not a permutation. It depends on (seed, epoch) alone.

So a resumed run continues the order of the run that was stopped.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from trainkit.core.errors import ConfigError
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.data.batch_order import EpochOrder
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.reading import epoch_seed
from trainkit.data.split import targets_of
from trainkit.data.store import Store

BUCKET = 50  # batches whose samples `length_bucketed` sorts by length
MAX_REPEATS = 1000  # of the data set in an epoch of a custom sampler, so that an endless one is an error


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(epoch_seed(seed, epoch))


# ---------------------------------------------------------------------------------- shipped samplers


def make_order(name: str, store: Store, batch_size: int, seed: int) -> EpochOrder:
    """Return the order of a shipped sampler.

    Args:
        name: a name in `schema.SAMPLERS`.
        store: the training samples.
        batch_size: samples per batch.
        seed: the seed of the run.

    Raises:
        ConfigError: the data set has no classes or lengths, or is too small.
    """
    dataset = store.dataset
    if name == "balanced":
        targets = classes_of_samples(dataset, store.form)
        return lambda epoch: balanced(targets, _generator(seed, epoch))
    if name == "length_bucketed":
        lengths = lengths_of_samples(dataset, store.form)
        return lambda epoch: length_bucketed(lengths, batch_size, _generator(seed, epoch))
    if len(dataset) < batch_size:
        raise ConfigError(
            f"data.sampler=contiguous: the {len(dataset)} training samples do not fill a batch of {batch_size}",
            hint=f"write batch_size={len(dataset)} or less",
        )
    order = contiguous(len(dataset), batch_size)
    return lambda _: order


def balanced(targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return an order in which each class occurs equally often; their numbers differ by at most one.

    A rare class repeats its samples. No sample is repeated before each sample of its class is used.
    """
    classes = targets.unique()
    counts = torch.full((len(classes),), len(targets) // len(classes))
    counts[torch.randperm(len(classes), generator=generator)[: len(targets) % len(classes)]] += 1
    chosen = []
    for label, count in zip(classes, counts.tolist(), strict=True):
        members = (targets == label).nonzero().flatten()
        passes = -(-count // len(members))
        repeated = [members[torch.randperm(len(members), generator=generator)] for _ in range(passes)]
        chosen += [torch.cat(repeated)[:count]] if repeated else []
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=generator)]


def length_bucketed(lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return an order whose batches hold samples of similar length, in random order. A smaller batch is the last.

    The samples are shuffled, and sorted by length inside of buckets of many batches.
    """
    order = torch.randperm(len(lengths), generator=generator)
    size = max(1, min(BUCKET, len(order) // (4 * batch_size))) * batch_size
    buckets = [bucket[lengths[bucket].argsort(stable=True)] for bucket in order.split(size)]
    smaller = torch.tensor([], dtype=torch.int64)
    rest = len(order) % batch_size
    if rest:  # its place among the lengths is random, so that `drop_last` drops samples of any length
        last = buckets[-1]
        start = batch_size * int(torch.randint(len(last) // batch_size + 1, (), generator=generator))
        smaller = last[start : start + rest]
        buckets[-1] = torch.cat([last[:start], last[start + rest :]])
    batches = torch.cat(buckets).reshape(-1, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([shuffled.flatten(), smaller])


def contiguous(samples: int, batch_size: int) -> Tensor:
    """Return an order in which row i of a batch is the sample after row i of the batch before.

    With S = samples // batch_size, batch k is k, k + S, k + 2S, ... The last samples % batch_size samples are unused.
    """
    steps = samples // batch_size
    return torch.arange(steps * batch_size).reshape(batch_size, steps).T.flatten()


def classes_of_samples(dataset: Any, form: SampleForm = PAIRS) -> Tensor:
    """Return the classes of all samples, (N,) int64.

    Raises:
        ConfigError: the data set does not list them.
    """
    base, indices = _base_and_indices(dataset)
    targets = targets_of(base, form)
    if targets is None:
        raise ConfigError(
            f"data.sampler=balanced: {name_and_place(type(base), method='')} does not list the classes of its samples",
            hint="give it an attribute `targets`, a list of class numbers",
        )
    return targets if indices is None else targets[indices]


def lengths_of_samples(dataset: Any, form: SampleForm = PAIRS) -> Tensor:
    """Return the lengths of all samples, (N,) int64: the attribute `lengths`, or else the length of the first input.

    Raises:
        ConfigError: a sample has no length.
    """
    base, indices = _base_and_indices(dataset)
    if getattr(base, "lengths", None) is not None:
        lengths = torch.as_tensor(base.lengths)
        return lengths if indices is None else lengths[indices]
    with preserve_rng():
        return torch.tensor([_length(base, form.pair(dataset[index], dataset)[0]) for index in range(len(dataset))])


def _length(dataset: Any, first: Any) -> int:
    while isinstance(first, tuple | Mapping) and first:
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    try:
        return len(first)
    except TypeError:
        cause = f"the first input of {name_and_place(type(dataset), method='')} has no length"
        hint = "give the data set an attribute `lengths`, a list of numbers"
        raise ConfigError(f"data.sampler=length_bucketed: {cause}", hint=hint) from None


def _base_and_indices(dataset: Any) -> tuple[Any, Tensor | None]:
    """Return the whole data set behind subsets, and the indices of the samples in it; None: all samples."""
    indices: Tensor | None = None
    while isinstance(dataset, Subset):
        inner = torch.from_numpy(np.asarray(dataset.indices, dtype=np.int64))
        indices = inner if indices is None else inner[indices]
        dataset = dataset.dataset
    return dataset, indices


# ----------------------------------------------------------------------------------- custom samplers


def order_of_sampler(sampler: Any, samples: int, seed: int) -> EpochOrder:
    """Return the order that a torch `Sampler` draws, with the global generators seeded by (seed, epoch).

    Args:
        sampler: yields indices. Its method `set_epoch(epoch)` is called first, if it has one.
        samples: the number of samples in the data set.
        seed: the seed of the run.

    Raises:
        ConfigError: the sampler yields anything else, or its order depends on more than (seed, epoch).
    """
    name = name_and_place(type(sampler), method="")
    if not hasattr(type(sampler), "__iter__"):
        raise ConfigError(f"data.sampler: {name} has no __iter__", hint="write __iter__, which yields the indices")

    maximum = MAX_REPEATS * samples + (len(sampler) if hasattr(type(sampler), "__len__") else 0)

    def draw(epoch: int) -> Tensor:
        with preserve_rng():
            number = epoch_seed(seed, epoch)
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            return _as_indices([*itertools.islice(sampler, maximum + 1)], samples, maximum, name)

    first = draw(0)

    def order(epoch: int) -> Tensor:
        drawn = draw(epoch)
        if len(drawn) != len(first):
            cause = f"{name} yields {len(drawn)} indices in epoch {epoch + 1}, and {len(first)} in epoch 1"
            raise ConfigError(f"data.sampler: {cause}", hint="yield the same number of indices in each epoch")
        return drawn

    if not draw(0).equal(first):
        raise ConfigError(
            f"data.sampler: {name} yields another order when it is read again, which a resumed run cannot repeat",
            hint="draw random numbers from the global generator of torch, NumPy or Python, which are seeded",
        )
    return order


def _as_indices(yielded: list[Any], samples: int, maximum: int, name: str) -> Tensor:
    """Return what a sampler yielded as a tensor, (N,) int64."""
    hint = f"yield indices from 0 to {samples - 1}"
    if not yielded:
        raise ConfigError(f"data.sampler: {name} yields no indices", hint=hint)
    if len(yielded) > maximum:
        cause = f"{name} yields more than {maximum:,} indices, and the training set has {samples} samples"
        raise ConfigError(f"data.sampler: {cause}", hint="stop __iter__ at the end of an epoch")
    if any(isinstance(item, bool) for item in yielded):
        raise ConfigError(f"data.sampler: {name} yields True and False, not indices", hint=hint)
    wrong = next((item for item in yielded if isinstance(item, list | tuple)), None)
    if wrong is not None:
        cause = f"{name} yields lists of indices, and trainkit makes the batches"
        raise ConfigError(f"data.sampler: {cause}", hint="yield single indices; batch_size sets the size of a batch")
    try:
        indices = torch.tensor([item.__index__() for item in yielded], dtype=torch.int64)
    except (AttributeError, TypeError):
        other = next(item for item in yielded if not hasattr(item, "__index__"))
        raise ConfigError(f"data.sampler: {name} yields {other!r}, not an index", hint=hint) from None
    outside = indices[(indices < 0) | (indices >= samples)]
    if len(outside):
        cause = f"{name} yields the index {int(outside[0])}, and the training set has {samples} samples"
        raise ConfigError(f"data.sampler: {cause}", hint=hint)
    return indices

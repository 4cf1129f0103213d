"""The classes of a data set, and the split of a store into training and validation samples."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.sample_errors import NotAPairError, SampleFormError
from trainkit.data.store import Store


def targets_of(dataset: Any, form: SampleForm = PAIRS) -> Tensor | None:
    """Return the classes of all samples, (N,) int64, or None if the data set does not list them."""
    targets = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset):
        targets = dataset.tensors[1] if len(dataset.tensors) > 1 else None
        with suppress(NotAPairError, SampleFormError):  # the first read of a sample reports them
            targets = form.pair(dataset.tensors, dataset)[1]
    if targets is None or isinstance(targets, Mapping | tuple):
        return None
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):  # names or boxes, which are not classes
        return None
    return None if targets.is_floating_point() or targets.dim() != 1 else targets


def count_classes(dataset: Any, form: SampleForm = PAIRS) -> int | None:
    """Return the number of classes: of the attribute `classes`, else the largest target + 1, else None.

    The attribute is a list of names, or the number of classes: an int, also of NumPy or torch.

    Raises:
        ConfigError: the attribute is neither.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None:
        targets = targets_of(dataset, form)
        return None if targets is None or not len(targets) else int(targets.max()) + 1
    with suppress(TypeError):  # a 0-d array has no length
        return len(classes)
    number = 0
    with suppress(TypeError):  # not an integer
        number = operator.index(classes)
    if number < 1 or isinstance(classes, bool):
        raise ConfigError(
            f"data.train: the attribute `classes` of {name_and_place(type(dataset), method='')} is {classes!r}, "
            "and it must be a list of names or a number from 1",
            hint="correct the attribute, or write data.classes=NUMBER",
        )
    return number


def split(store: Store, fraction: float) -> tuple[Store, Store]:
    """Split a store into training and validation samples, with nearly the same fraction of each class.

    The split depends on the data set alone, not on the seed of the run. So runs with different seeds are
    validated on the same samples.

    Args:
        store: the store of the whole data set.
        fraction: the fraction of samples that is held out for validation, from 0 to 1.

    Returns:
        Two stores: of the training samples, and of the validation samples.
    """
    order, classes = _shuffled_classes(store)
    position = torch.empty(len(store), dtype=torch.float64)  # of each sample in its shuffled class, from 0 to 1
    for members in classes:
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # The samples with the lowest positions are held out: the same part of each class.
    by_position = order[position[order].argsort(stable=True)]
    held_out = torch.zeros(len(store), dtype=torch.bool)
    held_out[by_position[: round(fraction * len(store))]] = True
    return store.subset(~held_out), store.subset(held_out)


def take_fold(store: Store, folds: int, fold: int) -> tuple[Store, Store]:
    """Divide a store into folds, and return one fold as the validation samples.

    The folds are disjoint and depend on the data set alone. Their sizes differ by at most one sample, and so do their
    numbers of samples of each class.

    Args:
        store: the store of the whole data set.
        folds: the number of folds.
        fold: the number of the fold, from 0.

    Returns:
        Two stores: of the samples outside of the fold, and of those in the fold.

    Raises:
        ConfigError: there are more folds than samples.
    """
    if folds > len(store):
        cause = f"data.folds={folds}: the training set has {len(store)} sample{'s' * (len(store) != 1)}"
        raise ConfigError(cause, hint="write a smaller data.folds")
    by_class = torch.cat(_shuffled_classes(store)[1])
    held_out = torch.zeros(len(store), dtype=torch.bool)
    held_out[by_class[fold::folds]] = True  # every folds-th sample of the classes in a row
    return store.subset(~held_out), store.subset(held_out)


def _shuffled_classes(store: Store) -> tuple[Tensor, list[Tensor]]:
    """Return the samples in a fixed random order, and those of each class in that order.

    Without classes, all samples are one class.
    """
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    targets = targets_of(store.dataset, store.form)
    return order, [order] if targets is None else [order[targets[order] == label] for label in targets.unique()]


def split_notes(overrides: Sequence[str], *, held_out: bool) -> list[str]:
    """Return a note if the overrides set `data.split`, and the data has a validation set.

    Args:
        overrides: of the command line.
        held_out: whether the validation samples are taken out of the training data.
    """
    if held_out or not any(text.startswith("data.split=0") for text in overrides):
        return []
    return ["note: this data has a validation set, so nothing is split off; data.val=null uses data.split"]

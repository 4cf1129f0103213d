"""Config to data sets, held in memory or not, and to the loaders of their batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from trainkit.build.instantiate import call_target
from trainkit.config.settings import Settings
from trainkit.core import device
from trainkit.core.errors import ConfigError, DataError, TrainkitError, UserCodeError
from trainkit.data import cache
from trainkit.data.augment import Augment
from trainkit.data.datasets import count_classes, split
from trainkit.data.loaders import CachedDataset, Loader, in_tensors, make_loader
from trainkit.data.prepare import Prepare

LOSSES_OF_NUMBERS = ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss")


@dataclass
class Loaders:
    """The loaders, and how they came about."""

    train: Loader
    val: Loader | None
    split_off: bool  # the validation set, from the training set
    notes: list[str]


def loaders(settings: Settings, where: torch.device, on_progress: cache.OnProgress | None) -> tuple[Settings, Loaders]:
    """Build the loaders; return them with settings that include the number of classes and of steps."""
    train_set, val_set, classes, split_off, notes = datasets(settings, on_progress)
    if settings.data.classes is None and classes is None and settings.model_needs_classes:
        raise ConfigError(
            f"data.classes: {settings.data.train['_target_']} does not give it, and the model refers to it",
            hint="write data.classes=NUMBER, or give the data set an attribute `classes` or `targets`",
        )
    settings = settings.with_data(classes=classes)
    train = loader(settings, train_set, where, train=True)
    val = None if val_set is None else loader(settings, val_set, where, train=False)
    return settings.with_data(classes=classes, steps_per_epoch=len(train)), Loaders(train, val, split_off, notes)


def datasets(settings: Settings, on_progress: cache.OnProgress | None) -> tuple[Any, Any, int | None, bool, list[str]]:
    """The training set; the validation set: named, else split off, else None; the number of classes.

    The last but one says whether the validation set was split off, the last where the samples are.
    """
    train = _dataset(settings, "train")
    if train is None:
        raise DataError("data.train gave no data set", hint="choose another: data=digits")
    val = None if settings.data.val is None else _dataset(settings, "val")
    classes = count_classes(train)
    split_off = val is None and settings.data.split is not None
    if len(train) == 0 or (val is not None and len(val) == 0):
        raise empty("data.val" if len(train) else "data.train")
    notes = []
    source = train
    train, words = held(settings, "train", train, on_progress)
    notes.append(f"training data: {amount(train)}, {words}")
    if val is not None:
        val, words = held(settings, "val", val, on_progress)
        notes.append(f"validation data: {amount(val)}, {words}")
    if val is None and settings.data.split is not None:
        train, val = split(train, settings.data.split, source)
        if not (len(train) and len(val)):
            raise empty("data.val" if len(train) else "data.train")
        notes[0] += f"; {len(val):,} of them held out for validation"
    return train, val, classes, split_off, notes


def amount(dataset: Any) -> str:
    """How many samples there are, and how many of those held cannot be read."""
    missing = len(dataset.missing) if isinstance(dataset, CachedDataset) else 0
    lost = f" ({missing} unreadable: see trainkit.log)" if missing else ""
    return f"{len(dataset):,} sample{'s' * (len(dataset) != 1)}{lost}"


def empty(name: str) -> DataError:
    """What to say of a data set without samples."""
    return DataError(f"{name} has no samples", hint="give it data, or change data.split")


def held(settings: Settings, part: str, dataset: Any, on_progress: cache.OnProgress | None) -> tuple[Any, str]:
    """The data set, in memory where the config says so or it fits; what was done."""
    free = device.free_memory(torch.device("cpu"))
    limit = free / 2 if settings.data.cache_limit == "auto" else settings.data.cache_limit * 2**30
    try:
        return cache.choose(
            dataset,
            settings.data.cache or "none",
            limit=int(limit),
            workers=settings.data.num_workers,
            skip=settings.data.on_unreadable == "skip",
            partly=settings.limit_batches is not None,
            on_progress=on_progress,
        )
    except TrainkitError:
        raise
    except Exception as error:
        raise UserCodeError(f"data.{part}", error) from error


def _dataset(settings: Settings, part: str) -> Any:
    node: Any = getattr(settings.data, part)
    try:
        dataset = call_target(node, f"data.{part}")
    except UserCodeError as error:
        if str(node["_target_"]).startswith("torchvision.") and not isinstance(error.error, TypeError):
            raise DataError(
                f"{node['_target_']} cannot read or fetch {node.get('root')}: " + " ".join(str(error.error).split()),
                hint="put them there by hand, choose another folder with data.root=FOLDER, "
                "or train on what needs no download: data=digits",
            ) from error
        if isinstance(error.error, OSError):
            error.exit_code = DataError.exit_code
        raise
    if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"data.{part}: {type(dataset).__name__} has no length or no items, so no epoch can be told",
            hint="give it __len__ and __getitem__, as torch.utils.data.Dataset has",
        )
    return dataset


def preparation(settings: Settings, where: torch.device, *, train: bool) -> Prepare:
    """What is done to a batch; training images are changed at random where the config asks for it."""
    normalize, asked = settings.data.normalize, settings.data.augment
    mean = None if normalize is None else torch.tensor(normalize.mean, device=where)
    std = None if normalize is None else torch.tensor(normalize.std, device=where)
    options: Any = {} if asked is None else dataclasses.asdict(asked)
    augment = None
    if train and any(options.get(key) for key in ("flip", "crop_padding", "cutout", "mixup", "cutmix")):
        options["flip"] = "random" if options["flip"] is True else options["flip"]
        numbers = str(settings.loss.get("_target_")).rpartition(".")[2] in LOSSES_OF_NUMBERS
        augment = Augment(settings.seed, **options, classes=None if numbers else settings.data.classes)
    return Prepare(where, mean, std, augment)


def loader(settings: Settings, dataset: Any, where: torch.device, *, train: bool) -> Loader:
    """The loader of a data set: the training set is shuffled by the seed, samples in tensors lie on the accelerator."""
    how, plain, lies = settings.data.cache or "none", in_tensors(dataset), torch.device("cpu")
    if plain is not None and where.type != "cpu" and how != "memory":
        size = cache.nbytes(plain[0].tensors)
        if how == "device" or size <= device.free_memory(where) / 2:
            lies = where
    return make_loader(
        dataset,
        preparation(settings, where, train=train),
        batch_size=settings.batch_size,
        seed=settings.seed if train else None,
        num_workers=settings.data.num_workers,
        limit_batches=settings.limit_batches,
        skip=settings.data.on_unreadable == "skip",
        stream=how == "none",
        device=lies,
    )

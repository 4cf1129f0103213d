"""Config to data sets, held in memory or not, and to the loaders of their batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from trainkit.build.instantiate import call_target
from trainkit.config.resolvers import count_steps
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


def loaders(
    config: DictConfig, where: torch.device, on_progress: cache.OnProgress | None
) -> tuple[DictConfig, Loaders]:
    """A copy of the config that knows what the data tells, classes and steps; the loaders."""
    train_set, val_set, classes, split_off, notes = datasets(config, on_progress)
    config = config.copy()
    if config.data.classes is None:
        config.data.classes = classes
        if classes is None and "data.classes" in OmegaConf.to_yaml(config.model):
            raise ConfigError(
                f"data.classes: {config.data.train['_target_']} does not say how many it has, and the model asks",
                hint="write data.classes=NUMBER, or give the data set an attribute `classes` or `targets`",
            )
    train = loader(config, train_set, where, train=True)
    val = None if val_set is None else loader(config, val_set, where, train=False)
    count_steps(config, len(train))
    return config, Loaders(train, val, split_off, notes)


def datasets(config: DictConfig, on_progress: cache.OnProgress | None) -> tuple[Any, Any, int | None, bool, list[str]]:
    """The training set; the validation set: named, else split off, else None; the number of classes.

    The last but one says whether the validation set was split off, the last where the samples are.
    """
    train = _dataset(config, "train")
    if train is None:
        raise DataError("data.train gave no data set", hint="choose another: data=digits")
    val = None if config.data.val is None else _dataset(config, "val")
    classes = count_classes(train)
    split_off = val is None and config.data.split is not None
    if len(train) == 0 or (val is not None and len(val) == 0):
        raise empty("data.val" if len(train) else "data.train")
    notes = []
    source = train
    train, words = held(config, "train", train, on_progress)
    notes.append(f"training data: {amount(train)}, {words}")
    if val is not None:
        val, words = held(config, "val", val, on_progress)
        notes.append(f"validation data: {amount(val)}, {words}")
    if split_off:
        train, val = split(train, config.data.split, source)
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


def held(config: DictConfig, part: str, dataset: Any, on_progress: cache.OnProgress | None) -> tuple[Any, str]:
    """The data set, in memory where the config says so or it fits; what was done."""
    free = device.free_memory(torch.device("cpu"))
    limit = free / 2 if config.data.cache_limit is None else config.data.cache_limit * 2**30
    try:
        return cache.choose(
            dataset,
            config.data.cache or "none",
            limit=int(limit),
            workers=config.data.num_workers,
            skip=config.data.on_error == "skip",
            partly=config.limit_batches is not None,
            on_progress=on_progress,
        )
    except TrainkitError:
        raise
    except Exception as error:
        raise UserCodeError(f"data.{part}", error) from error


def _dataset(config: DictConfig, part: str) -> Any:
    node = config.data[part]
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


def preparation(config: DictConfig, where: torch.device, *, train: bool) -> Prepare:
    """What is done to a batch; training images are changed at random where the config asks for it."""
    normalize, asked = config.data.normalize, config.data.augment
    mean, std = (normalize and torch.tensor(normalize[key], device=where) for key in ("mean", "std"))
    options: Any = {} if asked is None else OmegaConf.to_container(asked, resolve=True)
    augment = None
    if train and any(options.get(key) for key in ("flip", "crop", "cutout", "mixup", "cutmix")):
        options["flip"] = "random" if options["flip"] is True else options["flip"]
        numbers = str(config.loss.get("_target_")).rpartition(".")[2] in LOSSES_OF_NUMBERS
        augment = Augment(config.seed, **options, classes=None if numbers else config.data.classes)
    return Prepare(where, mean, std, augment)


def loader(config: DictConfig, dataset: Any, where: torch.device, *, train: bool) -> Loader:
    """The loader of a data set: the training set is shuffled by the seed, samples in tensors lie on the accelerator."""
    how, plain, lies = config.data.cache or "none", in_tensors(dataset), torch.device("cpu")
    if plain is not None and where.type != "cpu" and how != "memory":
        size = cache.nbytes(plain[0].tensors)
        if how == "device" or size <= device.free_memory(where) / 2:
            lies = where
    return make_loader(
        dataset,
        preparation(config, where, train=train),
        batch_size=config.batch_size,
        seed=config.seed if train else None,
        num_workers=config.data.num_workers,
        limit_batches=config.limit_batches,
        skip=config.data.on_error == "skip",
        stream=how == "none",
        device=lies,
    )

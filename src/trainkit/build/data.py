"""From settings to loaders: data set -> store -> split -> loader."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainkit.build.form import build_form
from trainkit.build.instantiate import call_target
from trainkit.build.shared_batches import check_mixing, mixes_samples
from trainkit.build.streams import build_stream_loader, describe_stream, make_stream, readers_of, refuse_split
from trainkit.config.schema import SAMPLERS
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.device import free_memory
from trainkit.core.errors import ConfigError, DataError, TrainkitError, UserCodeError
from trainkit.core.file_lock import locked
from trainkit.core.pytree import describe
from trainkit.core.ranks import ALONE, Ranks
from trainkit.data.augment import Augment
from trainkit.data.batch_order import EpochOrder, Share
from trainkit.data.cache import OnProgress, make_store
from trainkit.data.checks import check_dataset
from trainkit.data.disk_cache import cache_folder
from trainkit.data.flow import FlowingLoader
from trainkit.data.form import SampleForm
from trainkit.data.loaders import Loader, make_loader
from trainkit.data.pairs import Pair
from trainkit.data.prepare import Prepare
from trainkit.data.sample_errors import explain_sample_error
from trainkit.data.samplers import make_order, order_of_sampler
from trainkit.data.split import count_classes, split, take_fold
from trainkit.data.store import Store
from trainkit.data.stream_loader import StreamLoader
from trainkit.data.streams import Stream, is_stream
from trainkit.losses import FLOAT_TARGET_LOSSES, MODULES


@dataclass
class Stores:
    """The samples for training and for validation."""

    train: Store | Stream
    val: Store | Stream | None
    classes: int | None  # None: neither the config nor the data set gives the number
    held_out: bool  # whether the validation samples were split off the training data
    notes: list[str]  # where the samples are stored, for people


@dataclass
class Loaders:
    """The loaders of a training."""

    train: Loader
    val: Loader | None
    held_out: bool  # see `Stores`
    notes: list[str]


def build_loaders(
    settings: Settings, device: torch.device, on_progress: OnProgress | None, ranks: Ranks = ALONE
) -> tuple[Settings, Loaders]:
    """Build the loaders; return them with settings that include the number of classes and of steps.

    Args:
        settings: the settings of the run.
        device: receives the batches.
        on_progress: is called while samples are read into memory. None: no samples are read.
        ranks: the processes that train together. Each reads its share of each batch.

    Raises:
        ConfigError: the model needs the number of classes, and the data set does not give it.
        DataError: a data set cannot be read, or is empty.
        UserCodeError: a data set raised an error.
    """
    stores = build_stores(settings, device, on_progress, ranks)
    if settings.data.classes is None and stores.classes is None and settings.model_needs_classes:
        raise ConfigError(
            f"data.classes: {settings.data.train['_target_']} does not give it, and the model refers to it",
            hint="write data.classes=NUMBER, or give the data set an attribute `classes` or `targets`",
        )
    settings = settings.with_data(classes=stores.classes)
    standardize = training_statistics(stores.train) if settings.data.standardize else None
    build = functools.partial(build_loader, settings, device=device, standardize=standardize, ranks=ranks)
    train = build(stores.train, train=True)
    val = None if stores.val is None else build(stores.val, train=False)
    if settings.steps_per_epoch is not None and not isinstance(train, StreamLoader):
        train = FlowingLoader(train, settings.steps_per_epoch)
    settings = settings.with_data(classes=stores.classes, steps_per_epoch=len(train))
    return settings, Loaders(train, val, stores.held_out, stores.notes)


def build_stores(
    settings: Settings, device: torch.device, on_progress: OnProgress | None, ranks: Ranks = ALONE
) -> Stores:
    """Build the data sets and store their samples.

    If there is no validation set but a `data.split`, validation samples are taken out of the training data.
    """
    form = build_form(settings)
    train_set = build_dataset(settings, "train")
    if train_set is None:
        raise DataError("data.train returned no data set", hint="choose other data, for example data=digits")
    val_set = None if settings.data.val is None else build_dataset(settings, "val")
    if val_set is not None and settings.data.folds is not None:
        raise ConfigError("data.val: the fold is the validation set", hint="write data.val=null")
    for name, dataset in (("train", train_set), ("val", val_set)):
        if dataset is not None and not is_stream(dataset) and len(dataset) == 0:
            raise empty_error(name)
    train = store_samples(settings, "train", train_set, device, on_progress, form)
    notes = [f"training data: {describe_samples(train, settings, ranks)}"]
    held_out = False
    val = None
    if val_set is not None:
        val = store_samples(settings, "val", val_set, device, on_progress, form)
        notes.append(f"validation data: {describe_samples(val, settings, ranks)}")
    elif isinstance(train, Stream):
        refuse_split(settings)
    elif settings.data.split is not None:
        train, val = split(train, settings.data.split)
        for name, store in (("train", train), ("val", val)):
            if not len(store):
                raise empty_error(name)
        held_out = True
        notes[0] += f"; {len(val):,} of these samples are held out for validation"
    elif settings.data.folds is not None and settings.data.fold is not None:
        train, val = take_fold(train, settings.data.folds, settings.data.fold)
        held_out = True
        which = f"fold {settings.data.fold} of {settings.data.folds}"
        notes[0] += f"; {len(val):,} of these samples, {which}, are held out for validation"
    classes = settings.data.classes or count_classes(train_set, form)
    notes += note_classes(settings.data.classes, train_set)
    return Stores(train, val, classes, held_out, notes)


def note_classes(configured: int | None, dataset: Any) -> list[str]:
    """Return a note if the config gives another number of classes than the data set's attribute `classes`."""
    if configured is None or getattr(dataset, "classes", None) is None:
        return []
    with suppress(ConfigError):  # a wrong attribute does not matter, because the config gives the number
        found = count_classes(dataset)
        if found != configured:
            text = f"note: data.classes is {configured:,}, and the data set has {found:,} classes"
            return [f"{text}; data.classes=null takes the number of the data set"]
    return []


def build_dataset(settings: Settings, part: str) -> Any:
    """Build the data set `data.train` or `data.val`.

    Raises:
        ConfigError: see `check_dataset`.
        DataError: torchvision cannot read or download the data set.
        UserCodeError: the data set raised another error.
    """
    node: Any = getattr(settings.data, part)
    try:
        with one_download_at_a_time(node):
            dataset = call_target(node, f"data.{part}")
    except UserCodeError as error:
        if str(node["_target_"]).startswith("torchvision.") and not isinstance(error.error, TypeError):
            reason = " ".join(str(error.error).split())
            raise DataError(
                f"{node['_target_']} cannot read or download {node.get('root')}: {reason}",
                hint="put the files there by hand, choose another folder with data.root=FOLDER, "
                "or choose data that needs no download: data=digits",
            ) from error
        if isinstance(error.error, OSError):
            error.exit_code = DataError.exit_code
        raise
    if dataset is not None:
        check_dataset(dataset, f"data.{part}")
    return dataset


@contextmanager
def one_download_at_a_time(node: Mapping[str, Any]) -> Iterator[None]:
    """Let other processes of this machine wait while this one may download the same data set (`download: true`)."""
    folder = cache_folder() if node.get("download") else None
    if folder is None:
        yield
        return
    place = Path(str(node.get("root", ""))).expanduser().absolute()
    name = hashlib.sha256(f"{node.get('_target_')} {place}".encode()).hexdigest()[:16]
    with locked(folder / "downloads" / f"{name}.lock"):
        yield


def store_samples(
    settings: Settings,
    part: str,
    dataset: Any,
    device: torch.device,
    on_progress: OnProgress | None,
    form: SampleForm,
) -> Store | Stream:
    """Store the samples of a data set as the settings ask; errors of the data set name its key. A stream stays."""
    data = settings.data
    if is_stream(dataset):
        return make_stream(settings, dataset, part)
    free = free_memory(torch.device("cpu"))
    limit = free / 2 if data.cache_limit == "auto" else data.cache_limit * 2**30
    try:
        return make_store(
            dataset,
            data.cache or "none",
            device,
            limit=int(min(limit, sys.maxsize)),
            workers=data.num_workers,
            skip=data.on_unreadable == "skip",
            partial=_limit(settings, train=part == "train") is not None,
            on_progress=on_progress,
            key=f"data.{part}",
            form=form,
        )
    except TrainkitError:
        raise
    except Exception as error:
        raise explain_sample_error(f"data.{part}", error) or UserCodeError(f"data.{part}", error) from error


def describe_samples(store: Store | Stream, settings: Settings, ranks: Ranks = ALONE) -> str:
    """Return the number of samples, and where they are stored or how they are read."""
    return describe_stream(store, settings, ranks) if isinstance(store, Stream) else describe_store(store)


def describe_store(store: Store) -> str:
    """Return the number of samples and where they are stored."""
    unreadable = f" ({len(store.unreadable)} unreadable: see trainkit.log)" if store.unreadable else ""
    return f"{len(store):,} sample{'s' * (len(store) != 1)}{unreadable}, {store.place}"


def empty_error(part: str) -> DataError:
    """Return the error for a data set without samples."""
    return DataError(f"data.{part} has no samples", hint="give it data, or change data.split")


def build_loader(
    settings: Settings,
    store: Store | Stream,
    device: torch.device,
    standardize: Pair | None = None,
    *,
    train: bool,
    ranks: Ranks = ALONE,
) -> Loader:
    """Build the loader of a store. The run's seed and the keys of the order are for the training samples only.

    Raises:
        ConfigError: the sampler is wrong, or `data.drop_last` leaves no batch.
    """
    data, size, share = settings.data, settings.batch_size, Share(ranks.rank, ranks.size)
    prepare = build_prepare(settings, device, standardize, train=train)
    if train and share.ranks > 1 and mixes_samples(settings):
        is_divided = isinstance(store, Stream) and readers_of(store, ranks, size).are_several
        check_mixing(settings, share.ranks, is_divided=is_divided)
        share, prepare.drop_first = dataclasses.replace(share, with_previous=True), True
    if isinstance(store, Stream):
        return build_stream_loader(settings, store, prepare, train=train, share=share, ranks=ranks)
    loader = make_loader(
        store,
        prepare,
        batch_size=size if train else settings.val_batch_size,
        seed=settings.seed if train else None,
        num_workers=data.num_workers,
        limit_batches=_limit(settings, train=train),
        limit_batch_size=size,  # val_batch_size is part of the machine, and must not choose the samples
        skip=data.on_unreadable == "skip",
        order=build_order(settings, store) if train else None,
        drop_last=train and bool(data.drop_last),
        share=share,
    )
    if not len(loader):
        cause = f"data.drop_last: the {len(store)} training samples do not fill a batch of {size}"
        raise ConfigError(cause, hint="lower batch_size, or write data.drop_last=off")
    return loader


def training_statistics(train: Store | Stream) -> Pair:
    """Return the mean and the standard deviation of each input over the training samples, (F,) float64.

    An input without spread keeps its scale.

    Raises:
        ConfigError: the inputs are not numbers of shape (N, F) in memory.
    """
    inputs = None if isinstance(train, Stream) or train.tensors is None else train.tensors[0]
    if (
        isinstance(train, Stream)
        or not isinstance(inputs, torch.Tensor)
        or inputs.dim() != 2
        or not inputs.is_floating_point()
    ):
        shape = "streamed" if inputs is None else describe(inputs)
        cause = f"data.standardize: it needs inputs (N, F) of floats in memory, and these are {shape}"
        raise ConfigError(cause, hint="write data.standardize=off; images have data.normalize")
    rows = inputs if train.rows is None else inputs[train.rows]
    std, mean = torch.std_mean(rows.double().cpu(), dim=0, correction=0)
    return mean, torch.where(std == 0, 1, std)


def build_order(settings: Settings, store: Store) -> EpochOrder | None:
    """Build the order of the training samples that `data.sampler` or `data.shuffle` asks for; None: a permutation."""
    sampler, samples = settings.data.sampler, len(store)
    if sampler is None:
        return None if settings.data.shuffle else lambda _: torch.arange(samples)
    if sampler in SAMPLERS:
        return make_order(sampler, store, settings.batch_size, settings.seed)
    node = sampler if isinstance(sampler, dict) else {"_target_": sampler}
    given = {"data_source": store.dataset, "dataset": store.dataset, "batch_size": settings.batch_size}
    with suppress(TypeError, ValueError):  # compiled code may have no signature
        names = inspect.signature(locate(node["_target_"])).parameters
        given = {name: value for name, value in given.items() if name in names and name not in node}
    try:
        return order_of_sampler(call_target(node, "data.sampler", **given), samples, settings.seed)
    except TrainkitError:
        raise
    except Exception as error:
        raise UserCodeError("data.sampler", error) from error


def _limit(settings: Settings, *, train: bool) -> int | None:
    return settings.limit_batches if train else settings.limit_val_batches


def build_prepare(settings: Settings, device: torch.device, standardize: Pair | None = None, *, train: bool) -> Prepare:
    """Build the preparation of a batch; training images are augmented if `data.augment` asks for it."""
    normalize, asked = settings.data.normalize, settings.data.augment
    mean = None if normalize is None else torch.tensor(normalize.mean, device=device)
    std = None if normalize is None else torch.tensor(normalize.std, device=device)
    options: Any = {} if asked is None else dataclasses.asdict(asked)
    if standardize is not None:
        mean, std = standardize
    augment = None
    if train and any(options.get(key) for key in ("flip", "crop_padding", "cutout", "mixup", "cutmix")):
        options["flip"] = "random" if options["flip"] is True else options["flip"]
        loss: Any = locate(settings.loss["_target_"])
        has_float_targets = MODULES.get(loss, loss) in FLOAT_TARGET_LOSSES
        augment = Augment(settings.seed, **options, classes=None if has_float_targets else settings.data.classes)
    return Prepare(device, mean, std, augment)

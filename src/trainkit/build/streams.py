"""Build the loader of a stream, and refuse the keys that a stream does not support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainkit.build.form import build_form
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, DataError, Problem
from trainkit.core.ranks import ALONE, Ranks
from trainkit.data.batch_order import WHOLE, Share
from trainkit.data.checks import length_of_stream
from trainkit.data.prepare import Prepare
from trainkit.data.stream_loader import StreamLoader
from trainkit.data.streams import Stream


def make_stream(settings: Settings, dataset: Any, part: str) -> Stream:
    """Return the stream of `data.train` or `data.val`.

    Raises:
        ConfigError: the config sets a key that a stream does not support.
        DataError: the length of the stream is 0.
    """
    stream = Stream(dataset, f"data.{part}", length_of_stream(dataset, f"data.{part}"))
    problems = [*_unsupported_keys(settings, part)]
    if problems:
        raise ConfigError(*problems)
    if stream.length == 0:
        raise DataError(f"data.{part} has no samples: __len__ of {stream.name} returns 0", hint="give it data")
    return stream


def _unsupported_keys(settings: Settings, part: str) -> Iterator[Problem]:
    """Yield a problem for each key that a stream does not support."""
    data, stream = settings.data, f"data.{part} is a stream, which"
    if part == "train" and data.sampler is not None:
        hint = "write data.sampler=off, and choose the order in __iter__"
        yield Problem(f"data.sampler: {stream} has no samples by index", hint)
    if part == "train" and data.standardize:
        hint = "write data.standardize=off, and scale the samples in __iter__"
        yield Problem(f"data.standardize: {stream} is not read before the training", hint)
    if data.cache in ("device", "memory"):
        yield Problem(f"data.cache={data.cache}: {stream} is not held in memory", "write data.cache=auto")
    if data.on_unreadable == "skip":
        hint = "write data.on_unreadable=stop, and catch the errors in __iter__"
        yield Problem(f"data.on_unreadable=skip: {stream} ends at an error", hint)


def refuse_split(settings: Settings) -> None:
    """Raise `ConfigError` if `data.split` or `data.folds` takes validation samples out of a stream."""
    hint = "write data.{}=off for no validation, or give a validation set: data.val._target_=..."
    for key in ("split", "folds"):
        value = getattr(settings.data, key)
        if value is not None:
            cause = f"data.{key}={value:g}: data.train is a stream, which cannot be divided"
            raise ConfigError(cause, hint=hint.format(key))


def readers_of(stream: Stream, ranks: Ranks, batch_size: int) -> Ranks:
    """Return the ranks among which a stream divides its samples; `ALONE`: each rank reads all samples.

    A set of Hugging Face with fewer shards than ranks is not divided, because some ranks would have no samples.

    Raises:
        ConfigError: the stream is divided already, or a batch has fewer samples than ranks.
    """
    if not ranks.are_several or not stream.shards_itself:
        return ALONE
    if getattr(stream.dataset, "_distributed", None):
        hint = "remove split_dataset_by_node: trainkit divides the set among the ranks"
        raise ConfigError(f"{stream.key}: the set is already divided among nodes", hint=hint)
    shards = getattr(stream.dataset, "num_shards", None)
    if isinstance(shards, int) and shards < ranks.size:
        return ALONE
    if batch_size < ranks.size:
        cause = f"batch_size={batch_size}: {stream.key} divides its samples among {ranks.size} ranks"
        raise ConfigError(cause, hint=f"write batch_size={ranks.size} or more")
    return ranks


def describe_stream(stream: Stream, settings: Settings, ranks: Ranks = ALONE) -> str:
    """Return a text about a stream: its length, the processes that read it, and the samples of a limited validation."""
    workers = settings.data.num_workers
    length = "a stream" if stream.length is None else f"a stream of {stream.length:,} samples"
    readers = f"{workers} worker{'s' * (workers > 1)}" if workers else "the main process"
    each = ", each its own share" if stream.shards_itself and workers > 1 else ""
    shards = getattr(stream.dataset, "num_shards", None)  # of a set of Hugging Face
    if each and isinstance(shards, int) and shards < workers:
        verb = "has" if shards == 1 else "have"
        each = f", {shards} of which {verb} a share: the set has {shards} shard{'s' * (shards > 1)}"
    text = f"{length}, read by {readers}{each}"
    if ranks.are_several and readers_of(stream, ranks, settings.batch_size).are_several:
        text += f" of each rank; the set divides its samples among {ranks.size} ranks, so the batches are not those of"
        text += " one process"
    elif ranks.are_several:
        text += " of each rank; every rank reads all samples and keeps its share of each batch"
    limit = settings.limit_val_batches
    if stream.key == "data.val" and limit is not None:
        text += f"; its first {limit * settings.batch_size:,} samples are used"
    return text


def build_stream_loader(
    settings: Settings, stream: Stream, prepare: Prepare, *, train: bool, share: Share = WHOLE, ranks: Ranks = ALONE
) -> StreamLoader:
    """Build the loader of a stream.

    Args:
        settings: the settings of the run.
        stream: the samples.
        prepare: moves a batch to the device.
        train: whether the samples are for training.
        share: which samples of each batch this process reads.
        ranks: the processes that train together.

    Raises:
        ConfigError: the number of batches in an epoch is unknown or 0.
    """
    data, size = settings.data, settings.batch_size
    readers = readers_of(stream, ranks, size if train else settings.val_batch_size)
    limit = settings.limit_batches if train else settings.limit_val_batches
    loader = StreamLoader(
        stream,
        prepare,
        batch_size=size if train else settings.val_batch_size,
        steps=steps_of_epoch(settings, stream, readers) if train else None,
        seed=settings.seed if train else None,
        num_workers=data.num_workers,
        limit=None if limit is None else limit * size,
        drop_last=train and bool(data.drop_last),
        form=build_form(settings),
        exact=train and settings.steps_per_epoch is None,
        share=share,
        ranks=readers,
    )
    if train and not len(loader):
        cause = f"data.drop_last: the {stream.length} training samples do not fill a batch of {size}"
        raise ConfigError(cause, hint="lower batch_size, or write data.drop_last=off")
    return loader


def steps_of_epoch(settings: Settings, stream: Stream, ranks: Ranks = ALONE) -> int:
    """Return the number of batches in an epoch: `steps_per_epoch`, or the batches of a pass over the stream.

    Raises:
        ConfigError: there is no `steps_per_epoch`, and the number of batches in a pass is unknown.
    """
    data, size = settings.data, settings.batch_size
    if settings.steps_per_epoch is not None:
        return settings.steps_per_epoch
    hint = "write steps_per_epoch=N: the steps from one validation to the next"
    if stream.length is None:
        cause = f"data.train: {stream.name} is a stream without a length, so the end of an epoch is unknown"
        raise ConfigError(cause, hint=hint)
    if ranks.are_several:
        cause = f"data.train: each of {ranks.size} ranks reads its own share of {stream.name}"
        raise ConfigError(f"{cause}, so the number of batches in an epoch is unknown", hint=hint)
    if stream.shards_itself and data.num_workers > 1:
        cause = f"data.num_workers={data.num_workers}: each worker reads its own share of {stream.name}"
        raise ConfigError(f"{cause}, so the number of batches in an epoch is unknown", hint=hint)
    samples = stream.length
    if settings.limit_batches is not None:
        samples = min(samples, settings.limit_batches * size)
    return samples // size if data.drop_last else -(-samples // size)

"""Checks of batches that several ranks share: an error for each training that would have other numbers.

A loss that compares samples and does not say so is found later, by `training.whole_batch`.
"""

from __future__ import annotations

from trainkit.build.last_batch import batch_sizes
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place
from trainkit.data.loaders import Loader
from trainkit.training.losses import whole_batch_module, why_whole_batch
from trainkit.training.state import State
from trainkit.training.whole_batch import ONE_RANK, shared_batches


def check_shared_batches(settings: Settings, state: State, train: Loader) -> None:
    """Raise `ConfigError` if several ranks cannot share the batches of a training."""
    objects, ranks = state.objects, state.objects.ranks
    if not ranks.are_several:
        return
    module = whole_batch_module(objects.model, objects.loss_fn)
    if module is not None:
        raise ConfigError(
            f"{shared_batches(ranks.size)}: {name_and_place(module)} {why_whole_batch(module)}", hint=ONE_RANK
        )
    for step in (objects.training_step, objects.evaluation_step):
        if step is not None and step.whole_batch:
            cause = f"{shared_batches(ranks.size)}: {step.key}: {step.place} has whole_batch = True"
            raise ConfigError(cause, hint=ONE_RANK)
    step, size = objects.training_step, settings.batch_size
    smallest = min(batch_sizes(train.samples or size, size))
    if step is not None and step.is_generator and smallest < ranks.size:
        cause = f"training_step: {step.place} needs samples on each of {ranks.size} ranks, and a batch has {smallest}"
        hint = f"write batch_size={ranks.size} or more" if size < ranks.size else "write data.drop_last=on"
        raise ConfigError(cause, hint=f"{hint}; or {ONE_RANK}")


def mixes_samples(settings: Settings) -> bool:
    """Return whether the augmentation mixes each sample with the sample before it in the batch."""
    augment = settings.data.augment
    return augment is not None and bool(augment.mixup or augment.cutmix)


def check_mixing(settings: Settings, ranks: int, *, is_divided: bool) -> None:
    """Raise `ConfigError` if a rank cannot know which sample comes before its share of a batch."""
    hint = "write data.augment.mixup=off data.augment.cutmix=off"
    cause = f"data.augment: {shared_batches(ranks)}, and mixing needs the sample before a share"
    if is_divided:
        raise ConfigError(
            f"{cause}, which another rank reads: the stream divides its samples", hint=f"{hint}; or {ONE_RANK}"
        )
    if settings.data.on_unreadable == "skip":
        raise ConfigError(f"{cause}, which may be unreadable", hint=f"write data.on_unreadable=stop; or {ONE_RANK}")

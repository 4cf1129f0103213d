"""A check of the smallest batch: batch norm cannot normalize a single value per channel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import torch

from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.core.pytree import take_samples
from trainkit.core.rng import preserve_rng
from trainkit.data.batch_order import Share
from trainkit.data.loaders import Loader
from trainkit.training.copies import copy_module
from trainkit.training.objects import takes_batch_statistics
from trainkit.training.state import State


def check_last_batch(settings: Settings, state: State, train: Loader) -> None:
    """Raise `ConfigError` if a forward pass of the epoch has one sample, which batch norm cannot normalize.

    The model is tried on one sample, because batch norm after a convolution can normalize a single image. If layers
    use the statistics of all ranks, each rank needs a sample, and two ranks have two samples.
    """
    model, size, ranks = state.objects.model, settings.batch_size, state.objects.ranks.size
    names = [name for name, module in model.named_modules() if takes_batch_statistics(module)]
    samples = train.samples or size
    if state.objects.synced is not None:
        check_shares(batch_sizes(samples, size), settings.micro_batch, ranks, state.objects.synced)
        return
    if not names or 1 not in forward_sizes(samples, size, settings.micro_batch, ranks):
        return
    try:
        with torch.no_grad(), preserve_rng():
            copied = copy_module(model).train()  # the forward pass may change buffers and attributes
            copied(take_samples(train.example()[0], 0, 1, 2))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            return
        cause, hint = f"batch_size={size}", "write batch_size=2 or more"
        if settings.micro_batch:
            cause, hint = f"micro_batch={settings.micro_batch}", "write another micro_batch or batch_size"
        elif ranks > 1:
            cause, hint = f"{samples} samples in batches of {size} on {ranks} ranks", "write sync_batchnorm=auto"
        elif size > 1:
            cause = f"{samples} samples in batches of {size}"
            hint = f"write batch_size={next(n for n in itertools.count(size + 1) if samples % n != 1)}"
        text = f"{cause}: a forward pass has one sample, which batch norm (model.{names[0]}) cannot normalize"
        raise ConfigError(text, hint=hint) from error
    except Exception:  # the first step reports it
        return


def check_shares(batches: Collection[int], micro_batch: int | None, ranks: int, synced: str) -> None:
    """Raise `ConfigError` if a rank has no sample in a forward pass, in which batch norm layers use all ranks.

    Args:
        batches: the numbers of samples in the batches of an epoch.
        micro_batch: the maximum number of samples in a forward pass.
        ranks: the number of ranks.
        synced: a batch norm layer.
    """
    reason = f"batch norm (model.{synced}) needs a sample on each of the {ranks} ranks"
    smallest = min(batches)
    if smallest < ranks:
        largest = max(batches)
        cause = f"a batch of {smallest} sample{'s' * (smallest > 1)}" if largest >= ranks else f"batch_size={largest}"
        hint = "write data.drop_last=on, or another batch_size" if largest >= ranks else f"write batch_size={ranks}"
        raise ConfigError(f"{cause}: {reason}", hint=f"{hint}, or sync_batchnorm=off")
    if micro_batch == 1 and any(samples % ranks for samples in batches):
        raise ConfigError(f"micro_batch=1: {reason} in each forward pass", hint="write micro_batch=2 or more")


def batch_sizes(samples: int, batch_size: int) -> set[int]:
    """Return the numbers of samples in the batches of an epoch."""
    return {min(batch_size, samples), samples % batch_size or batch_size}


def forward_sizes(samples: int, batch_size: int, micro_batch: int | None, ranks: int = 1) -> set[int]:
    """Return the numbers of samples in the forward passes of an epoch."""
    batches = batch_sizes(samples, batch_size)
    shares = {Share(rank, ranks).size(batch) for batch in batches for rank in range(ranks)} - {0}
    limit = micro_batch or math.inf
    return {size for share in shares for size in (min(share, limit), share % limit or min(share, limit))}  # type: ignore[misc]

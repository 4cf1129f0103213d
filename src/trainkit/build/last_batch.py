"""A check of the smallest batch: batch norm cannot normalize a single value per channel."""

from __future__ import annotations

import itertools
import math

import torch

from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.core.pytree import take_samples
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader
from trainkit.training.copies import copy_module
from trainkit.training.objects import takes_batch_statistics
from trainkit.training.state import State


def check_last_batch(settings: Settings, state: State, train: Loader) -> None:
    """Raise `ConfigError` if a forward pass of the epoch has one sample, which batch norm cannot normalize.

    The model is tried on one sample, because batch norm after a convolution can normalize a single image.
    """
    model, size = state.objects.model, settings.batch_size
    names = [name for name, module in model.named_modules() if takes_batch_statistics(module)]
    if not names or 1 not in forward_sizes(train.samples or size, size, settings.micro_batch):
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
        elif size > 1:
            samples = train.samples or size
            cause = f"{samples} samples in batches of {size}"
            hint = f"write batch_size={next(n for n in itertools.count(size + 1) if samples % n != 1)}"
        text = f"{cause}: a forward pass has one sample, which batch norm (model.{names[0]}) cannot normalize"
        raise ConfigError(text, hint=hint) from error
    except Exception:  # the first step reports it
        return


def forward_sizes(samples: int, batch_size: int, micro_batch: int | None) -> set[int]:
    """Return the numbers of samples in the forward passes of an epoch."""
    batches = {min(batch_size, samples), samples % batch_size or batch_size}
    limit = micro_batch or math.inf
    return {size for batch in batches for size in (min(batch, limit), batch % limit or min(batch, limit))}  # type: ignore[misc]

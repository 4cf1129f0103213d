"""Build the model and the loss as a training and an evaluation use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from trainkit.build.memory_format import apply_memory_format, choose_memory_format
from trainkit.build.model import build_loss, build_model, initialize_lazy_layers
from trainkit.config.settings import Settings
from trainkit.core.device import disable_malloc_trim, is_out_of_memory, select_device
from trainkit.core.errors import OutOfMemoryError, UserCodeError
from trainkit.core.ranks import ALONE, Ranks
from trainkit.core.rng import preserve_rng, seed_all
from trainkit.data.loaders import Loader, SlicingLoader
from trainkit.losses import FromModel
from trainkit.training.call import install_call
from trainkit.training.compile import defer_dynamo

Initialize = Callable[[nn.Module], object]


@contextmanager
def memory_errors() -> Iterator[None]:
    """Name the config key of an object whose construction in the block ran out of memory.

    Raises:
        OutOfMemoryError: there is too little memory for an object.
    """
    try:
        yield
    except Exception as error:
        key, cause = (error.key, error.error) if isinstance(error, UserCodeError) else ("model", error)
        if not is_out_of_memory(cause):
            raise
        hint = f"choose a smaller {key.partition('.')[0]} or another device"
        hint += ", or write data.cache=none" if key.startswith("data.") else ""
        text = f"{key}: memory ran out while it was built: {' '.join(str(cause).split()) or type(cause).__name__}"
        raise OutOfMemoryError(text, hint=hint) from error


def prepare_process(settings: Settings, ranks: Ranks = ALONE) -> torch.device:
    """Seed the generators and set what must be set before anything is built; return the device."""
    defer_dynamo()  # its import takes a second, and most runs do not need it
    device = ranks.device_of_rank(select_device(settings.device))
    seed_all(settings.seed, deterministic=bool(settings.deterministic))  # data sets may draw random samples
    if device.type == "cpu":
        disable_malloc_trim()  # a quarter of a step can go into returning memory and getting it again
    return device


def build_modules(
    settings: Settings, device: torch.device, loaders: list[Loader], initialize: Initialize | None = None
) -> tuple[nn.Module, nn.Module, list[str]]:
    """Build the model and the loss on the device, and choose how the model is called and the memory format.

    Args:
        settings: with the number of classes.
        device: of the model and the loss.
        loaders: whose batches the model gets. An example of the first shows the form of the inputs.
        initialize: is called with the new model, to load weights into it.

    Returns:
        The model, the loss, and notes about what was decided.
    """
    model = build_model(settings.model, device)
    call_note = _install_call(model, loaders[0])
    initialize_lazy_layers(model, loaders[0])
    if initialize is not None:
        initialize(model)
    loss_fn = build_loss(settings.loss).to(device)
    if isinstance(loss_fn, FromModel):
        loss_fn.bind(model)
    memory_format, reason = choose_memory_format(settings, device)
    # The whole batch also on several ranks, so that their number does not change the memory format.
    samples = min(settings.batch_size, settings.micro_batch or settings.batch_size)
    format_note = apply_memory_format(model, loss_fn, memory_format, loaders, device, samples) or reason
    return model, loss_fn, [note for note in (call_note, format_note) if note]


def _install_call(model: nn.Module, loader: Loader) -> str | None:
    """Decide how the model is called; return a note if its inputs are not a single tensor.

    Tensors in memory show it. Otherwise a sample is read.
    """
    if isinstance(loader, SlicingLoader) and isinstance(loader.tensors[0], Tensor):
        return None
    with suppress(Exception), preserve_rng():  # the training reports samples that cannot be read
        return install_call(model, loader.example()[0])
    return None

"""Choose and apply the memory format of images: contiguous, or channels_last, which makes convolutions faster."""

from __future__ import annotations

import copy
import inspect
import io
import math
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of, map_tensors
from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader
from trainkit.training.objects import needs_closure

# Values that the convolutions output in a forward pass, for each of their weights. With fewer, channels_last was never
# clearly faster on the CPU, and often slower: see docs/performance.md.
MIN_VALUES = 0.6


def choose_memory_format(settings: Settings, device: torch.device) -> tuple[str, str | None]:
    """Return the memory format to apply, and the reason if `auto` became contiguous.

    On an accelerator, weights and gradients use the memory format too. `auto` therefore becomes contiguous for
    optimizers that flatten gradients (LBFGS) and for optimizers from outside torch.

    Raises:
        ConfigError: the optimizer does not support `channels_last`.
    """
    if device.type == "cpu":
        return settings.memory_format, None
    makers = [locate(node["_target_"]) for node in settings.optim.values()]
    classes = [maker for maker in makers if inspect.isclass(maker) and issubclass(maker, Optimizer)]
    flattening = [cls for cls in classes if needs_closure(cls)]
    if flattening and settings.memory_format == "channels_last":
        cause = f"memory_format=channels_last: {flattening[0].__name__} needs contiguous gradients"
        raise ConfigError(cause, hint="write memory_format=auto")
    foreign = [maker for maker in makers if maker not in classes or not maker.__module__.startswith("torch.optim.")]
    if settings.memory_format != "auto" or not (flattening or foreign):
        return settings.memory_format, None
    name = getattr((flattening or foreign)[0], "__name__", "the optimizer")
    reason = f"images contiguous: {name} may need it; if it does not, write memory_format=channels_last"
    return "contiguous", None if flattening else reason


def apply_memory_format(
    model: nn.Module, loss_fn: nn.Module, requested: str, loaders: list[Loader], device: torch.device, samples: int
) -> str | None:
    """Apply a memory format to the model and to the images of the loaders; return a note for the log.

    `auto` tests one sample, because a model or loss that calls `view` on feature maps fails with channels_last.
    Weights stay contiguous on the CPU, because some optimizers need that. oneDNN then reorders them in each step, which
    takes longer than the convolutions gain if there are many weights and the batches are small.

    Args:
        model: the model.
        loss_fn: the loss.
        requested: auto, contiguous or channels_last.
        loaders: those of the training and of the validation.
        device: the device of the model.
        samples: the number of samples in a forward pass.
    """
    convolutions = convolutions_of(model)
    volumes = any(param.dim() == 5 for param in model.parameters())
    if requested == "contiguous" or (requested == "auto" and (not convolutions or volumes)):
        return None
    if requested == "auto":
        if device.type == "cpu" and any(map(corrupts_memory, convolutions)):
            return "images contiguous: torch may crash on a strided 1x1 convolution of few channels in channels_last"
        values = values_of_convolutions(model, loss_fn, loaders[0], device)
        if values is None:
            return "images contiguous: model or loss does not support channels_last (use reshape instead of view)"
        reordered = sum(module.weight.numel() for module in convolutions if math.prod(module.kernel_size) > 1)
        if device.type == "cpu" and samples * values < MIN_VALUES * reordered:
            return f"images contiguous: {samples} samples are few for {reordered:,} weights of convolutions"
    if device.type != "cpu":
        model.to(memory_format=torch.channels_last)
    for loader in loaders:
        loader.prepare.memory_format = torch.channels_last
    return f"images in channels_last, for {len(convolutions)} convolution{'s' * (len(convolutions) != 1)}"


def convolutions_of(model: nn.Module) -> list[Any]:
    """Return the 2-D convolutions of a model."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]


def corrupts_memory(convolution: Any) -> bool:
    """Return whether the backward pass of a convolution in channels_last may write past its memory on the CPU.

    torch 2.15 does so for strided kernels of 1x1 over 2 to 7 input channels, with one thread on a processor with AVX2.
    """
    is_strided = tuple(convolution.kernel_size) == (1, 1) and max(convolution.stride) > 1
    return is_strided and 1 < convolution.in_channels < 8


def values_of_convolutions(model: nn.Module, loss_fn: nn.Module, loader: Loader, device: torch.device) -> float | None:
    """Return the number of values that the convolutions output for a sample; None if channels_last is not supported.

    Copies of the model and the loss are tested. If they do not accept a contiguous sample either, the number is
    infinite: the training then reports the error.
    """

    def test(memory_format: torch.memory_format) -> float | None:
        parts = copy.deepcopy(nn.ModuleDict({"model": model, "loss": loss_fn}))
        copied = parts["model"] if device.type == "cpu" else parts["model"].to(memory_format=memory_format)
        images = map_tensors(inputs, lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t)
        try:
            with torch.no_grad():
                parts.eval()["loss"](copied(images), targets)
            outputs: list[int] = []
            for module in convolutions_of(copied):
                module.register_forward_hook(lambda module, inputs, output: outputs.append(output.numel()))  # noqa: ARG005
            loss = parts.train()["loss"](copied(images), targets)
            if loss.requires_grad:
                loss.backward()
        except Exception:
            return None
        return sum(outputs) / batch_size_of(images)

    try:
        inputs, targets = loader.example()
        with preserve_rng(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training repeats them
            values = test(torch.channels_last)
            return math.inf if values is None and test(torch.contiguous_format) is None else values
    except Exception:  # the model cannot be copied, or a sample cannot be read (the training reports that)
        return None

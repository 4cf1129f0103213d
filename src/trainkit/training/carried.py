"""The state that a model carries from batch to batch, such as the hidden state of an LSTM over a long text.

A module carries state if it defines `reset_state()`. It keeps the state in buffers, so that checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place

Captured = list[tuple[nn.Module, str, Tensor | None, Tensor | None]]  # module, name, the buffer, a copy of its values


def carrying_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that carry state from batch to batch: those with a method `reset_state`."""
    return [module for module in model.modules() if callable(getattr(module, "reset_state", None))]


def check_carried(modules: Iterable[nn.Module]) -> None:
    """Raise `ConfigError` if a module would carry state that a checkpoint does not hold."""
    for module in modules:
        buffers = [name for inner in module.modules() for name in inner._buffers]
        lost = [name for inner in module.modules() for name in inner._non_persistent_buffers_set]
        place = name_and_place(type(module), method="")
        if not buffers:
            hint = "keep the state in buffers: self.register_buffer('hidden', None) in __init__"
            raise ConfigError(f"model: {place} defines reset_state and has no buffer for the state", hint=hint)
        if lost:
            cause = f"model: {place} carries the buffer {lost[0]!r}, which is not persistent"
            raise ConfigError(cause, hint="checkpoints hold persistent buffers only: remove persistent=False")


def reset_carried(modules: Iterable[nn.Module]) -> None:
    """Let the modules start without state."""
    for module in modules:
        module.reset_state()  # type: ignore[operator]  # `carrying_modules` has checked that it is callable


def capture_carried(modules: Iterable[nn.Module]) -> Captured:
    """Return the buffers of the modules, with copies of their values."""
    return [
        (inner, name, buffer, None if buffer is None else buffer.clone())
        for module in modules
        for inner in module.modules()
        for name, buffer in inner._buffers.items()
    ]


def restore_carried(captured: Captured) -> None:
    """Restore the buffers that `capture_carried` returned."""
    with torch.no_grad():
        for module, name, buffer, before in captured:
            if buffer is not None and before is not None:
                buffer.copy_(before)
            module._buffers[name] = buffer


@contextmanager
def without_carried(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the modules start the block without state, and restore their state at its end."""
    modules = list(modules)
    captured = capture_carried(modules)
    reset_carried(modules)
    try:
        yield
    finally:
        restore_carried(captured)


def match_saved_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the buffers of carrying modules the shapes of a saved state, which depend on the batch size.

    Args:
        model: its state is loaded next.
        saved: its state dict.
    """
    for prefix, module in model.named_modules():
        if not callable(getattr(module, "reset_state", None)):
            continue
        for inner_prefix, inner in module.named_modules():
            for name in inner._buffers:
                value = saved.get(".".join(part for part in (prefix, inner_prefix, name) if part))
                inner._buffers[name] = _like(value, inner._buffers[name], model)


def match_buffers(average: nn.Module, trained: nn.Module) -> None:
    """Give the buffers of carrying modules in a moving average the shapes of those in the trained modules."""
    for own, other in zip(carrying_modules(average), carrying_modules(trained), strict=True):
        for inner, trained_inner in zip(own.modules(), other.modules(), strict=True):
            for name, value in trained_inner._buffers.items():
                inner._buffers[name] = _like(value, inner._buffers[name], average)


def _like(value: Tensor | None, buffer: Tensor | None, model: nn.Module) -> Tensor | None:
    """Return the buffer if it can take the value, else a new buffer that can; None if there is no value."""
    if value is None or (buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype):
        return None if value is None else buffer
    device = next((tensor.device for tensor in model.parameters()), value.device)
    return torch.empty_like(value, device=device)

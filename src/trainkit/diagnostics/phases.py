"""The duration of each phase of the training step. The real training loop is timed, not a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn

from trainkit.core.device import synchronize
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.diagnostics.batches import FixedStepsLoader
from trainkit.training.loop import train_epoch
from trainkit.training.state import State

PHASES = ("loader", "transfer", "forward", "backward", "step")


def run_trainkit_loop(state: State, loader: FixedStepsLoader, hooks: list[Any] | None = None) -> int:
    """Train for one pass over the loader with trainkit's own loop; return the number of samples."""
    state.begin_epoch()
    state.progress.batches = len(loader)
    train_epoch(state, loader, hooks or [])
    return state.progress.seen


def time_phases(state: State, loader: FixedStepsLoader) -> dict[str, float]:
    """Train for one pass over the loader; return the seconds spent in each phase.

    The device is synchronized at the end of each phase, so the sum is more than the duration of the training.
    """
    timer = PhaseTimer(state.objects.device)
    with timer.attached(state, loader.loader):
        run_trainkit_loop(state, loader, [timer])
    return timer.seconds


class PhaseTimer:
    """Adds the time since the end of the last phase to the phase that ends. It is also a hook of the loop."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = perf_counter()

    def end(self, phase: str) -> None:
        """End a phase."""
        synchronize(self.device)
        now = perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def on_step(self, state: State) -> None:  # noqa: ARG002
        """End the step."""
        self.end("step")

    @contextmanager
    def attached(self, state: State, loader: Loader) -> Iterator[None]:
        """Let the loader, the model, the loss and `backward` end their phases inside the block."""
        objects, prepare, model = state.objects, loader.prepare, state.objects.model

        def timed_prepare(*batch: Any) -> Batch:
            self.end("loader")
            prepared = prepare(*batch)
            self.end("transfer")
            return prepared

        with ExitStack() as stack:
            stack.callback(setattr, loader, "prepare", prepare)
            stack.callback(setattr, objects, "model", model)
            # A hook on the model would be compiled with the model, so the model is wrapped.
            objects.model = _CallBefore(model, lambda: self.end("step"))
            loader.prepare = timed_prepare  # type: ignore[assignment]
            stack.callback(objects.loss_fn.register_forward_hook(lambda *_: self.end("forward")).remove)
            stack.enter_context(_call_after_backward(lambda: self.end("backward")))
            yield


class _CallBefore(nn.Module):
    """Calls a function before each call of a module."""

    def __init__(self, module: nn.Module, function: Callable[[], None]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.function()
        return self.module(*args, **kwargs)


@contextmanager
def _call_after_backward(function: Callable[[], None]) -> Iterator[None]:
    """Call a function after each `Tensor.backward` inside the block."""
    backward = torch.Tensor.backward

    def backward_and_call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(tensor, *args, **kwargs)
        function()

    torch.Tensor.backward = backward_and_call  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]

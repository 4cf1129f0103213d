"""The hooks of the config group `debug`: fit one batch, profile some steps, find the source of NaN."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainkit.core.errors import NonFiniteError, TrainkitError, frames_of_user
from trainkit.core.paths import display_path
from trainkit.core.pytree import tensors_in
from trainkit.display.text import columns, number
from trainkit.training.state import State

# How torch reports a gradient that is NaN, and the warning before it.
NAN_GRADIENT = re.compile(r"Function '(\w+)' returned nan values")
SILENT = "99"  # above each level of messages of torch's profiler


class Overfit:
    """Trains one batch until its loss is near 0.

    Args:
        share: of the first loss, at which the training ends.
    """

    def __init__(self, share: float = 0.01) -> None:
        self.share = share
        self.first = self.last = float("nan")

    def on_start(self, state: State) -> None:
        """Let the training use its first batch in each step."""
        loader = state.loaders["train"]
        batch = next(iter(loader.batches(0)))
        steps = len(loader)
        loader.batches = lambda epoch=0, start=0: iter([batch] * (steps - start))  # type: ignore[method-assign,misc]  # noqa: ARG005

    def on_step(self, state: State) -> None:
        """Note the loss before the first update."""
        if state.progress.step == 1:
            self.first = state.progress.loss.item()

    def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:
        """End the training if the loss is near 0."""
        self.last = metrics["train/loss"]
        if self.fits:
            state.settings = replace(state.settings, steps=state.progress.step)

    @property
    def fits(self) -> bool:
        """Whether the loss is near 0."""
        return abs(self.last) <= self.share * abs(self.first)

    def on_end(self, state: State) -> None:
        """Print the result.

        Raises:
            TrainkitError: the model does not fit the batch.
        """
        text = f"loss {number(self.first)} -> {number(self.last)} after {state.progress.step:,} steps"
        if self.fits:
            print(f"debug=overfit: {text}: the model can fit a batch")
            return
        raise TrainkitError(
            f"debug=overfit: {text}: the model does not fit a batch", hint="; ".join(find_causes(state))
        )


def find_causes(state: State) -> list[str]:
    """Return what may keep a model from fitting a batch, as hints."""
    objects, hints = state.objects, ["try a larger or a smaller lr"]
    params = list(objects.trained.parameters())
    frozen = sum(not param.requires_grad for param in params)
    if frozen:
        hints.append(f"{frozen} of {len(params)} tensors are frozen")
    unused = sum(param.requires_grad and param.grad is None for param in params)
    if unused:
        hints.append(f"{unused} tensors have no gradient")
    noisy = [name for name, m in objects.model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
    if noisy:
        hints.append(f"set the dropout of {noisy[0]} to 0")
    if getattr(objects.loss_fn, "label_smoothing", 0):
        hints.append("a loss with label_smoothing does not reach 0")
    if any(group.get("weight_decay") for group in objects.optimizer.param_groups):
        hints.append("set weight_decay to 0")
    return [*hints, "check that the targets belong to the inputs"]


class Profile:
    """Profiles some steps, writes a trace, and prints the slowest operations.

    Args:
        skip: steps before the profile.
        active: steps that are profiled.
        rows: of the table.
    """

    def __init__(self, skip: int = 8, active: int = 10, rows: int = 15) -> None:
        self.skip, self.active, self.rows = skip, active, rows
        self.profiler: profile | None = None
        self.profiled = 0
        self.seen = 0

    def on_step(self, state: State) -> None:
        """Start the profile after `skip` steps, and end it after `active` further steps."""
        self.seen += 1
        if self.profiler is not None:
            self.profiled += 1
            if self.profiled == self.active:
                self._finish(state)
        elif self.seen == self.skip and not self.profiled:
            activities = [ProfilerActivity.CPU]
            if state.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            else:  # the profiler logs that it finds no GPU, as an error
                os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
            self.profiler = profile(activities=activities, acc_events=True)
            self.profiler.start()

    def on_end(self, state: State) -> None:
        """End a profile that is still open.

        Raises:
            TrainkitError: the training has ended before the profile began.
        """
        if self.profiler is not None:
            self._finish(state)
        if not self.profiled:
            cause = f"debug=profile: the training has {self.seen} steps, and the profile begins after {self.skip}"
            raise TrainkitError(cause, hint=f"write steps={self.skip + self.active}, or hooks.debug.skip=0")

    def _finish(self, state: State) -> None:
        assert self.profiler is not None
        assert state.directory is not None
        self.profiler.stop()
        trace = state.directory / "trace.json"
        self.profiler.export_chrome_trace(str(trace))
        print("\n".join(profile_table(self.profiler, self.profiled, self.rows)))
        print(f"trace of {self.profiled} steps, for https://ui.perfetto.dev: {display_path(trace)}")
        self.profiler = None


def profile_table(profiler: profile, steps: int, rows: int) -> list[str]:
    """Return a table of the operations that take most time themselves, per step."""
    events = profiler.key_averages()
    key = "self_device_time_total" if any(e.self_device_time_total for e in events) else "self_cpu_time_total"
    times = sorted(((float(getattr(e, key)), e.key, e.count) for e in events), reverse=True)
    total = sum(time for time, _, _ in times) or 1.0
    head = ["operation", "self ms a step", "share", "calls a step"]
    cells = [[n, f"{t / 1e3 / steps:.3f}", f"{t / total:.1%}", f"{c / steps:.1f}"] for t, n, c in times[:rows]]
    return columns([head, *cells])


class Anomaly:
    """Ends a training at the first non-finite output of a module or gradient, and names its source."""

    def __init__(self) -> None:
        self.undo: list[Any] = []

    def on_start(self, state: State) -> None:
        """Check the outputs of all modules and all gradients."""
        before = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(True)
        self.undo.append(lambda: torch.autograd.set_detect_anomaly(before))
        for name, module in state.objects.trained.named_modules():
            if not isinstance(module, torch.jit.ScriptModule) and module is not state.objects.trained:
                handle = module.register_forward_hook(lambda m, _, outputs, name=name: self.check(name, m, outputs))
                self.undo.append(handle.remove)
        backward = torch.Tensor.backward

        def checked(tensor: Tensor, *args: Any, **options: Any) -> None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    backward(tensor, *args, **options)
                except RuntimeError as error:
                    found = NAN_GRADIENT.search(str(error))
                    if found is None:
                        raise
                    self.on_end(state)
                    raise gradient_error(found[1], [str(warning.message) for warning in caught]) from error

        torch.Tensor.backward = checked  # type: ignore[method-assign,assignment]
        self.undo.append(lambda: setattr(torch.Tensor, "backward", backward))

    def check(self, name: str, module: nn.Module, outputs: Any) -> None:
        """Raise `NonFiniteError` if an output of a module is not finite. The innermost module is called first."""
        for tensor in tensors_in(outputs):
            if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all()):
                self.on_end(None)
                what = "NaN" if bool(tensor.isnan().any()) else "an infinite value"
                cause = f"debug=anomaly: the first module that returns {what} is {name}, a {type(module).__name__}"
                raise NonFiniteError(cause, hint="look at its forward, its weights and its inputs")

    def on_end(self, state: State | None) -> None:  # noqa: ARG002
        """Undo the checks."""
        while self.undo:
            self.undo.pop()()


def gradient_error(function: str, messages: list[str]) -> NonFiniteError:
    """Return the error for a NaN gradient: the line of the forward pass whose gradient it is.

    Args:
        function: torch's name of the backward function.
        messages: torch's warnings; one has the traceback of the forward pass.
    """
    frames = [frame for message in messages for frame in frames_of_user(message)]
    cause = f"debug=anomaly: the gradient of {function.removesuffix('0')} is NaN"
    if frames:
        cause += f", from this line of the forward pass:\n  {frames[-1]}"
    hint = "keep its input away from the values where its derivative is infinite, such as 0 for sqrt"
    return NonFiniteError(cause, hint=hint)

"""The events of a training, and the calls of the hooks that handle them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainkit.core.pytree import describe
from trainkit.training.metrics import Metrics, plain_metric

# Event -> the arguments of the hook's method, and when the loop calls it.
EVENTS = {
    "on_start": "(state) before the first step, and again when a run resumes (state.progress.step > 0 then)",
    "on_step": "(state) after each batch",
    "on_val_batch": "(state, inputs, targets, outputs) after each micro batch of a validation",
    "on_epoch": "(state, metrics) after each epoch; metrics that the hook adds are recorded, and may be monitored",
    "on_epoch_end": "(state, metrics) after the best epoch and early stopping are decided; the metrics are final",
    "on_end": "(state) after the last epoch",
    "on_split": "(state) after an out-of-memory error has halved the micro batch",
    "on_nonfinite": "(state, error) after a batch was skipped because its loss or gradient was not finite",
    "on_note": "(state, text) a note about the training for its user",
}


class HookError(Exception):
    """A hook does something that trainkit does not allow.

    Args:
        hook: the hook.
        cause: what it does.
        hint: the fix.
    """

    def __init__(self, hook: Any, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.hook, self.cause, self.hint = hook, cause, hint


def call_hooks(hooks: Sequence[Any], event: str, *args: Any) -> None:
    """Call the method named `event` of each hook that has one."""
    for hook in hooks:
        method = getattr(hook, event, None)
        if method is not None:
            method(*args)


def arguments_of(event: str) -> list[str]:
    """Return the names of the arguments of an event."""
    return EVENTS[event].partition(")")[0].lstrip("(").split(", ")


def add_hook_metrics(hooks: Sequence[Any], state: Any, metrics: Metrics) -> None:
    """Call `on_epoch` of each hook, which may add metrics to `metrics`.

    Raises:
        HookError: a hook changes or removes a metric of trainkit or of another hook, or adds a metric that the
            history cannot store.
    """
    for hook in hooks:
        before = {name: (value, repr(value)) for name, value in metrics.items()}
        returned = hook.on_epoch(state, metrics) if hasattr(hook, "on_epoch") else None
        if isinstance(returned, Mapping) and returned is not metrics:
            raise HookError(hook, "on_epoch returns metrics, which are ignored", "write metrics.update(...) instead")
        for name, (value, text) in before.items():
            if name not in metrics or metrics[name] is not value or repr(value) != text:  # a list may change in place
                change = "changes" if name in metrics else "removes"
                raise HookError(hook, f"on_epoch {change} the metric {name}", f"add it as hooks/{name} instead")
        for name in metrics.keys() - before.keys():
            if not isinstance(name, str):
                raise HookError(hook, f"a metric is named {name!r}, and names are strings", "name it mine/loss")
            try:
                metrics[name] = plain_metric(metrics[name])
            except (TypeError, ValueError):
                found = describe(metrics[name])
                found = f"a Tensor {found}" if isinstance(metrics[name], Tensor) else found
                cause = f"the metric {name} is {found}, which the history cannot store"
                raise HookError(hook, cause, "add metrics as numbers") from None

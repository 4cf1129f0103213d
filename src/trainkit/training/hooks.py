"""The events of a training, and the call of the hooks that handle them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Event -> the arguments of the hook's method, and when the loop calls it.
EVENTS = {
    "on_start": "(state) before the first step, and again when a run resumes (state.progress.step > 0 then)",
    "on_step": "(state) after each batch",
    "on_epoch": "(state, metrics) after each epoch; metrics that the hook adds are recorded",
    "on_end": "(state) after the last epoch",
    "on_split": "(state) after an out-of-memory error has halved the micro batch",
    "on_nonfinite": "(state, error) after a batch was skipped because its loss or gradient was not finite",
}


def call_hooks(hooks: Sequence[Any], event: str, *args: Any) -> None:
    """Call the method named `event` of each hook that has one."""
    for hook in hooks:
        method = getattr(hook, event, None)
        if method is not None:
            method(*args)

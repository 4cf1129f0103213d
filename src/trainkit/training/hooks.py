"""What the loop tells hooks: the events that a hook may have a method for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EVENTS = {
    "on_start": "(state) before the first step, and again where a run is resumed (state.progress.step > 0 then)",
    "on_step": "(state) after each batch",
    "on_epoch": "(state, metrics) after each epoch; metrics that it adds are kept",
    "on_end": "(state) after the last epoch",
    "on_split": "(state) memory ran out, and the micro batch was halved",
    "on_nonfinite": "(state, error) a batch was left out as its loss or gradient was not finite",
}


def call_hooks(hooks: Sequence[Any], event: str, *args: Any) -> None:
    """Call each hook that has a method for the event."""
    for hook in hooks:
        method = getattr(hook, event, None)
        if method is not None:
            method(*args)

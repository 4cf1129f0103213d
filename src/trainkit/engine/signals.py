"""Signals stop a training between two steps, after it has saved."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainkit.core.errors import Stopped
from trainkit.core.signals import handle_stop
from trainkit.training.state import State


@contextmanager
def handle_signals(state: State) -> Iterator[None]:
    """Let the first signal stop the training after the current step, and a second signal end the process.

    If no step is running, the first signal stops the training at once. Several ranks stop when they agree on the next
    batch. See `StopHandler` for repeated signals.
    """

    def stop(request: Stopped) -> None:
        state.stop = request
        # If a signal also reached another thread, Python runs its handler when this thread sleeps.
        # Sleep now, so that the handler runs before the error below is raised.
        time.sleep(0.05)
        if state.phase.interruptible and not state.objects.ranks.are_several:
            raise request

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    with handle_stop(stop) as handler:
        state.stop = handler.stop  # a signal that came before the training started, or None
        yield

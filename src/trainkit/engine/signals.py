"""Signals stop a training between two steps, after it has saved."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainkit.core.errors import Stopped
from trainkit.training.state import State

# The terminal was closed (SIGHUP), or a cluster takes the machine back (SIGUSR1).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

SAME_REQUEST = 1.0  # seconds: later signals within this time are part of the first request


@contextmanager
def handle_signals(state: State) -> Iterator[None]:
    """Let the first signal stop the training after the current step, and a second signal end the process.

    If no step is running, the first signal stops the training at once. Some launchers send a signal several
    times, so signals within `SAME_REQUEST` seconds of the first are ignored.
    """
    requested_at = math.inf

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal requested_at
        if state.stop is None:
            requested_at = time.monotonic()
            state.stop = Stopped(number)
            # If the same signal also reached another thread, Python runs its handler when this thread sleeps.
            # Sleep now, so that the handler runs before the error below is raised.
            time.sleep(0.05)
            if state.phase.interruptible:
                raise state.stop
        elif time.monotonic() - requested_at > SAME_REQUEST:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # show the cursor, which a live display hides
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    state.stop = Stopped.pending  # a signal that came before the training started, or None
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    # A signal that is ignored already, as under nohup, stays ignored.
    to_handle = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous_handlers = {number: signal.signal(number, stop) for number in to_handle}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():  # None: it was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
    """Let a signal stop the training between two steps; a second signal ends the process at once.

    Signals within `SAME_REQUEST` seconds of the first count as one, as some launchers send several.
    """
    requested_at = math.inf

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal requested_at
        if state.stop is None:
            requested_at = time.monotonic()
            state.stop = Stopped(number)
            # A second signal may be delivered to another thread, and be handled only after this one sleeps.
            time.sleep(0.05)
            if state.phase.interruptible:
                raise state.stop
        elif time.monotonic() - requested_at > SAME_REQUEST:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # show the cursor, which a live display hides
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    state.stop = Stopped.pending
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores some
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""The signals that stop a command: the first signal counts, and later signals within a second repeat it.

`is_running` says whether another process runs.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from trainkit.core.errors import Stopped

# The terminal was closed (SIGHUP), or a cluster takes the machine back (SIGUSR1). Windows has neither.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

SAME_REQUEST = 1.0  # seconds: launchers may send a signal several times


class StopHandler:
    """A signal handler: the first signal requests a stop, and a signal after `SAME_REQUEST` ends the process.

    Args:
        on_stop: is called with the requested stop, and may raise it.

    Attributes:
        stop: the stop that the first signal requested.
        closed: whether the command has finished, so that a signal has nothing to stop.
    """

    def __init__(self, on_stop: Callable[[Stopped], None]) -> None:
        self.on_stop = on_stop
        self.stop: Stopped | None = None
        self.requested_at = math.inf
        self.closed = False
        self.arrived: deque[bytes] = deque()  # the numbers of the signals in their order
        self.pipe: tuple[int, int] | None = None

    @classmethod
    def active(cls) -> StopHandler | None:
        """Return the handler that is installed and not closed."""
        found = (handler for handler in map(signal.getsignal, SIGNALS) if isinstance(handler, cls))
        return next((handler for handler in found if not handler.closed), None)

    def install(self) -> dict[int, Any]:
        """Handle the signals; return the previous handlers. A signal that is ignored, as under nohup, stays ignored."""
        _register_at_fork()
        if os.name == "posix":
            self.pipe = os.pipe()
            for end in self.pipe:
                os.set_blocking(end, False)
            signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        return {number: signal.signal(number, self) for number in handled}

    def close(self) -> None:
        """Let the first signal do nothing from now on."""
        self.closed, self.on_stop = True, _do_nothing
        if self.pipe is not None:
            ends, self.pipe = self.pipe, None
            signal.set_wakeup_fd(-1)
            for end in ends:
                os.close(end)

    def ignore(self) -> None:
        """Ignore the signals. Python resets handlers while it exits, but keeps signals ignored."""
        for number in SIGNALS:
            if signal.getsignal(number) is self:
                signal.signal(number, signal.SIG_IGN)

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Handle a signal."""
        if self.stop is None:
            stop, now = Stopped(self._first(number)), time.monotonic()
            if self.stop is None:  # another signal may have been handled in the line above
                self.stop, self.requested_at = stop, now
                self.on_stop(stop)
        elif time.monotonic() - self.requested_at > SAME_REQUEST:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # show the cursor, which a live display hides
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _first(self, number: int) -> int:
        """Return the signal that arrived first. Python handles signals that arrive together by their number."""
        if self.pipe is not None:
            # One call in C: Python handles no other signal before all numbers are in their place.
            with suppress(OSError):  # the pipe is empty
                self.arrived.extend(iter(functools.partial(os.read, self.pipe[0], 1), b""))
        return next((arrived[0] for arrived in self.arrived if arrived[0] in SIGNALS), number)


@contextmanager
def handle_stop(on_stop: Callable[[Stopped], None]) -> Iterator[StopHandler]:
    """Call `on_stop` if a signal requests a stop in the block. A command's own handler is used if there is one."""
    handler = StopHandler.active()
    if handler is not None:
        before, handler.on_stop = handler.on_stop, on_stop
        try:
            yield handler
        finally:
            handler.on_stop = before
        return
    handler = StopHandler(on_stop)
    previous_handlers = handler.install()
    try:
        yield handler
    finally:
        for number, previous in previous_handlers.items():  # None: it was not set from Python
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        handler.close()


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay signals until the end of the block. Processes that start in the block receive none before they unblock."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _do_nothing(_: Stopped) -> None:
    pass


@functools.cache
def _register_at_fork() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reset_in_child)


def _reset_in_child() -> None:
    """Give a forked process the default actions, so that `multiprocessing.Pool` can terminate it."""
    handled = [number for number in SIGNALS if isinstance(signal.getsignal(number), StopHandler)]
    if handled:
        signal.set_wakeup_fd(-1)  # the parent's pipe
    for number in handled:
        signal.signal(number, signal.SIG_DFL)


def is_running(pid: int) -> bool:
    """Return whether a process of this machine is running, also if it belongs to another user."""
    try:
        os.kill(pid, 0)  # sends no signal
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True

"""Import many modules fast."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from trainkit.core.errors import Stopped
from trainkit.core.signals import StopHandler, handle_stop


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pause Python's garbage collector while the block imports modules, and exempt their objects from it.

    Modules stay until the process ends. To search the objects of torch for garbage takes a fifth of the time of its
    import, and as much again at the exit.

    A signal stops the command at the end of the block. An error that a signal handler raises in the C++ code of an
    import would abort the process.
    """
    enabled, has_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        with _late_stop():
            yield
    finally:
        if not has_torch:  # else there is little to gain, and the process holds objects of others
            gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _late_stop() -> Iterator[None]:
    """Let a signal that arrives in the block stop the command at its end; a second signal ends the process at once."""
    handler, stops = StopHandler.active(), list[Stopped]()
    if handler is None:
        yield
        return
    with handle_stop(stops.append):
        yield
    for stop in stops:
        handler.on_stop(stop)

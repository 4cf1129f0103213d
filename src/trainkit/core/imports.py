"""Import many modules fast."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pause Python's garbage collector while the block imports modules, and exempt their objects from it.

    Modules stay until the process ends. To search the many objects of torch for garbage takes a fifth of the time of
    its import, and as long again as the process exits.
    """
    enabled, has_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if not has_torch:  # else there is little to gain, and the process holds objects of others
            gc.freeze()
        if enabled:
            gc.enable()

"""Work in a background thread, one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread for one piece of work at a time. Its errors are raised in the thread that waits for the work."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start a piece of work. The one before it must have been waited for."""
        assert self.thread is None
        self.thread = threading.Thread(target=self._run, args=(work,), name="trainkit-background")
        self.thread.start()

    def has_ended(self, *, wait: bool) -> bool:
        """Return whether no work is under way; with `wait`, wait for its end.

        Raises:
            Exception: what the work has raised.
        """
        if self.thread is not None:
            if wait:
                self.thread.join()
            if self.thread.is_alive():
                return False
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error
        return True

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error

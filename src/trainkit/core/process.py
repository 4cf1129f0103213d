"""Run a command to its exit code: errors become messages, and signals stop the command."""

from __future__ import annotations

import atexit
import functools
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from trainkit.core.errors import Stopped, StorageError, TrainkitError, describe_bug
from trainkit.core.rank_variables import is_first_rank, own_rank
from trainkit.core.redaction import hide_arguments
from trainkit.core.signals import StopHandler
from trainkit.core.terminal import printable


def run_to_exit_code(command: Callable[[], int], words: Sequence[str] = ()) -> int:
    """Run a command; return its exit code. The handlers of signals stay until the process has exited.

    Args:
        command: returns an exit code, or raises an error. The error is printed to stderr.
        words: the arguments of the command line. Messages do not show the secrets in them.
    """
    open_standard_streams()
    handler, previous = StopHandler(_raise_stop), sys.unraisablehook
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _install(handler)
            return _run(command)
        finally:  # the exit code is decided
            handler.close()
            sys.unraisablehook = previous
    except KeyboardInterrupt as error:
        return _stopped(error)
    except TrainkitError as error:
        # A library may have turned the interrupt into its own error.
        if Stopped.pending:
            return _stopped(Stopped.pending)
        return _fail(hide_arguments(str(error), words), error, error.exit_code)
    except BrokenPipeError:  # the reader of stdout stopped early, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        text = f"error: {error}\n  correct the cause, or run trainkit in another folder"
        return _fail(printable(hide_arguments(text, words)), error, StorageError.exit_code)
    except Exception as error:
        if Stopped.pending:
            return _stopped(Stopped.pending)
        return _fail(hide_arguments(describe_bug(error), words), error, 1)


def _is_printed_elsewhere(error: BaseException) -> bool:
    """Return whether another rank prints an error. Before the ranks are connected, one rank of each machine prints."""
    is_first_here = is_first_rank() or os.environ.get("LOCAL_RANK") == "0"
    return getattr(error, "is_printed_by_first", not is_first_here)


def open_standard_streams() -> None:
    """Open the null device for each standard stream that is closed, as by `<&-`.

    Otherwise another file would get its number, and a process that redirects its streams would lose this file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number


def _run(command: Callable[[], int]) -> int:
    """Run a command; return its exit code.

    Raises:
        Stopped: a signal stopped the command, also if a library has swallowed the interrupt.
    """
    code = command()
    if sys.stdout is not None:  # closed, as by `>&-`
        sys.stdout.flush()
    if Stopped.pending:
        raise Stopped.pending
    return code


def _install(handler: StopHandler) -> None:
    Stopped.pending = None
    atexit.register(handler.ignore)  # registered first, so that it runs last
    handler.install()
    sys.unraisablehook = functools.partial(_skip_stopped, sys.unraisablehook)


def _raise_stop(stop: Stopped) -> None:
    Stopped.pending = stop
    raise stop


def _skip_stopped(previous: Callable[[Any], Any], unraisable: Any) -> None:
    """Print no traceback if a signal interrupted a destructor, which cannot pass the error on."""
    if not isinstance(unraisable.exc_value, Stopped):
        previous(unraisable)


def _stopped(error: KeyboardInterrupt) -> int:
    stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
    return _fail(_stop_message(stopped), error, stopped.exit_code)


def _stop_message(stopped: Stopped) -> str:
    saved = f", saved as {stopped.saved}" if stopped.saved else ""
    return printable(f"stopped by {stopped.name}" + (f": {stopped.summary}" if stopped.summary else saved))


def _fail(text: str, error: BaseException, code: int) -> int:
    if os.environ.get("TRAINKIT_TRACEBACK") == "1":
        traceback.print_exception(error)
    if not _is_printed_elsewhere(error):
        _print(text)
    return code


def print_error(error: TrainkitError | Stopped) -> None:
    """Print an error that ends the process to stderr."""
    _print(_stop_message(error) if isinstance(error, Stopped) else str(error))


def _print(text: str) -> None:
    """Print a message to stderr, with the rank if it is not rank 0."""
    text = text if is_first_rank() else f"rank {own_rank()}: {text}"
    try:
        print(text, file=sys.stderr or sys.__stderr__, flush=True)
    except (OSError, AttributeError, ValueError):  # stderr is closed: use /dev/null, or Python fails again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

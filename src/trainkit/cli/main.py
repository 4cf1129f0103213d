"""Run the command of a command line; turn errors into a message and an exit code."""

from __future__ import annotations

import atexit
import functools
import importlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError, Stopped, StorageError, TrainkitError, describe_bug
from trainkit.core.redaction import hide_arguments
from trainkit.core.signals import StopHandler
from trainkit.core.spelling import nearest
from trainkit.core.terminal import printable

COMMANDS = sorted(path.stem.replace("_", "-") for path in (Path(__file__).parent / "commands").glob("[a-z]*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. The handlers of signals stay until the process has exited."""
    argv = list(sys.argv[1:] if argv is None else argv)
    handler, previous = StopHandler(_raise_stop), sys.unraisablehook
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _install(handler)
            return _run(argv)
        finally:  # the exit code is decided
            handler.close()
            sys.unraisablehook = previous
    except KeyboardInterrupt as error:
        return _stopped(error)
    except TrainkitError as error:
        # A library may have turned the interrupt into its own error.
        if Stopped.pending:
            return _stopped(Stopped.pending)
        return _fail(hide_arguments(str(error), argv), error, error.exit_code)
    except BrokenPipeError:  # the reader of stdout stopped early, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        text = f"error: {error}\n  correct the cause, or run trainkit in another folder"
        return _fail(printable(hide_arguments(text, argv)), error, StorageError.exit_code)
    except Exception as error:
        if Stopped.pending:
            return _stopped(Stopped.pending)
        return _fail(hide_arguments(describe_bug(error), argv), error, 1)


def _run(argv: list[str]) -> int:
    """Run a command; return its exit code.

    Raises:
        Stopped: a signal stopped the command, also if a library has swallowed the interrupt.
    """
    # Last, so that `_target_: mymodels.Net` finds ./mymodels.py, but ./random.py does not shadow Python's module.
    sys.path.append(str(Path.cwd()))
    code = dispatch(argv)
    if sys.stdout is not None:  # closed, as by `>&-`
        sys.stdout.flush()
    if Stopped.pending:
        raise Stopped.pending
    return code


def dispatch(argv: list[str]) -> int:
    """Run the command that argv names; without a name, run `train`."""
    name, rest = "train", argv
    if argv and argv[0] in COMMANDS:
        name, rest = argv[0], argv[1:]
    elif argv and argv[0].replace("-", "").replace("_", "").isalnum() and not argv[0].startswith("-"):
        from trainkit.config.schema import RootKeys

        near = nearest(argv[0], [*COMMANDS, *RootKeys.__annotations__]) or "train"
        hint = f"did you mean trainkit {near}?" if near in COMMANDS else f"write {near}=VALUE"
        raise ConfigError(
            f"{argv[0]}: neither a command nor KEY=VALUE", hint=f"{hint}; trainkit --help lists commands and keys"
        )
    if {"--help", "-h"} & set(rest):
        from trainkit.cli.help import help_text

        print(help_text())
        return 0
    if "--version" in rest:
        from trainkit import __version__

        print(f"trainkit {__version__}")
        return 0
    if "--schema" in rest:
        from trainkit.config.json_schema import json_schema

        print(json.dumps(json_schema(), indent=2))
        return 0
    code: int = importlib.import_module(f"trainkit.cli.commands.{name.replace('-', '_')}").run(rest)
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
    saved = f", saved as {stopped.saved}" if stopped.saved else ""
    return _fail(printable(f"stopped by {stopped.name}{saved}"), error, stopped.exit_code)


def _fail(text: str, error: BaseException, code: int) -> int:
    if os.environ.get("TRAINKIT_TRACEBACK") == "1":
        traceback.print_exception(error)
    try:
        print(text, file=sys.stderr or sys.__stderr__, flush=True)
    except (OSError, AttributeError, ValueError):  # stderr is closed: use /dev/null, or Python fails again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code

"""argv to command; errors to one clear message and an exit code. Imports neither torch nor a command."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trainkit.core.errors import ConfigError, Stopped, StorageError, TrainkitError
from trainkit.core.spelling import nearest

COMMANDS = sorted(path.stem.replace("_", "-") for path in (Path(__file__).parent / "commands").glob("[a-z]*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays what it is
            signal.signal(number, _stop)
    try:
        # At the end: `_target_: mymodels.Net` finds ./mymodels.py, and no ./random.py hides Python's.
        sys.path.append(str(Path.cwd()))
        code = dispatch(argv)
        if sys.stdout is not None:  # closed, as by `>&-`
            sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return _stopped(error)
    except TrainkitError as error:
        # Libraries may turn the interrupt into an error of their own.
        return _stopped(Stopped.pending) if Stopped.pending else _fail(str(error), error, error.exit_code)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        return _fail(f"error: {error}\n  mend that, or run trainkit elsewhere", error, StorageError.exit_code)
    except Exception as error:
        if Stopped.pending:
            return _stopped(Stopped.pending)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"error: {type(error).__name__}: {error}\n  at {where.filename}, line {where.lineno}; "
        return _fail(text + "set TRAINKIT_TRACEBACK=1 and run again to see all of it", error, 1)


def dispatch(argv: list[str]) -> int:
    """Find the command (no name means `train`) and run it."""
    name, rest = "train", argv
    if argv and argv[0] in COMMANDS:
        name, rest = argv[0], argv[1:]
    elif argv and argv[0].replace("-", "").replace("_", "").isalnum() and not argv[0].startswith("-"):
        from trainkit.config.schema import RootKeys

        near = nearest(argv[0], [*COMMANDS, *RootKeys.__annotations__]) or "train"
        hint = f"did you mean trainkit {near}?" if near in COMMANDS else f"write {near}=VALUE"
        raise ConfigError(f"{argv[0]}: neither a command nor KEY=VALUE", hint=f"{hint}; see trainkit --help")
    if {"--help", "-h"} & set(rest):
        from trainkit.cli import help as usage

        print(usage.text())
        return 0
    if "--version" in rest:
        from trainkit import __version__

        print(f"trainkit {__version__}")
        return 0
    code: int = importlib.import_module(f"trainkit.cli.commands.{name.replace('-', '_')}").run(rest)
    return code


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    Stopped.pending = Stopped(number)
    raise Stopped.pending


def _stopped(error: KeyboardInterrupt) -> int:
    stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
    saved = f", saved as {stopped.saved}" if stopped.saved else ""
    return _fail(f"stopped by {stopped.name}{saved}", error, stopped.exit_code)


def _fail(text: str, error: BaseException, code: int) -> int:
    if os.environ.get("TRAINKIT_TRACEBACK") == "1":
        traceback.print_exception(error)
    try:
        print(text, file=sys.stderr or sys.__stderr__, flush=True)
    except (OSError, AttributeError, ValueError):  # there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code

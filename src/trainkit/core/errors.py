"""The errors a person can mend, each with the exit code that scripts can rely on."""

from __future__ import annotations

import re
import signal
import site
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trainkit.core.spelling import did_you_mean


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its cause in a line, and in another what mends it."""

    cause: str
    hint: str = ""

    def __str__(self) -> str:
        return f"error: {self.cause}" + (f"\n  {self.hint}" if self.hint else "")


class TrainkitError(Exception):
    """Something went wrong that one clear message explains; `exit_code` is the command's."""

    exit_code = 1

    def __init__(self, *problems: Problem | str, hint: str = "") -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p, hint) for p in problems]
        super().__init__("\n".join(map(str, self.problems)))

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(TrainkitError):
    """The command line or the config is wrong; holds every problem that was found."""

    exit_code = 2
    composed: Any = None  # what could be composed all the same, for finding more that is wrong


class CheckpointError(TrainkitError):
    """There is no checkpoint to go on from, or it does not belong to this training."""

    exit_code = 3


class NonFiniteError(TrainkitError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 4


class DataError(TrainkitError):
    """A data set is missing, corrupt or out of reach."""

    exit_code = 5


class StorageError(TrainkitError):
    """The run directory cannot be written."""

    exit_code = 6


class RunDirectoryInUseError(TrainkitError):
    """The run directory belongs to another run, or another process is at work in it."""

    exit_code = 7


class OutOfMemoryError(TrainkitError):
    """The device's memory does not hold what was asked of it."""

    exit_code = 8


class UserCodeError(TrainkitError):
    """Code that the config names raised an error; told with that code's own frames.

    Args:
        key: the config key that led there, such as `model`.
        error: what was raised.
        exit_code: 2 while things are built, 1 once the training runs.
        details: more on where it happened.
        hint: what fixes it, where that is known.
    """

    def __init__(
        self, key: str, error: BaseException, *, exit_code: int = 2, details: str = "", hint: str = ""
    ) -> None:
        self.key, self.error, self.exit_code = key, error, exit_code
        lines = str(error).strip().splitlines() or ["no message"]
        if "Original Traceback" in str(error):  # of a loader's worker; its last line is the error
            lines = lines[-1:]
        name = type(error).__name__
        self.first_line = lines[0] if lines[0].startswith(name) else f"{name}: {lines[0]}"
        frames = [f"{f.filename}, line {f.lineno}, in {f.name}: {f.line}" for f in own_frames(error)]
        where = "mend it there, or change" if frames else "change"
        hint = hint or unknown_argument(error) or f"{where} {key}; TRAINKIT_TRACEBACK=1 shows all"
        more = [line for line in (*lines[1:4], details, *frames) if line]
        super().__init__("\n  ".join([f"{key}: {self.first_line}", *more]), hint=hint)


class Stopped(KeyboardInterrupt):
    """A signal asked the training to stop.

    Like the interrupt that it is no `Exception`: nobody's `except Exception` may swallow it. Its exit
    code is the shell's, 128 + the signal's number, but for SIGUSR1: 75, which asks a scheduler to start
    the job again.
    """

    pending: ClassVar[Stopped | None] = None  # by a signal that came before there was a training to stop

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.exit_code = 75 if self.name == "SIGUSR1" else 128 + number
        self.saved = ""  # where, and what goes on from there
        super().__init__(self.name)


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of a traceback that lie in neither trainkit, Python nor an installed package."""
    foreign = [str(Path(__file__).parents[1]), *site.getsitepackages(), sysconfig.get_path("stdlib"), "<"]
    return [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(tuple(foreign))]


def unknown_argument(error: BaseException) -> str:
    """The nearest argument, where a call deep inside was given one that it does not take."""
    told = re.match(r"(\S+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or told is None or error.__traceback__ is None:
        return ""
    name = told[1].removesuffix(".__init__").rpartition(".")[2]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        called = frame.f_globals.get(name)
        code = getattr(getattr(called, "__init__", None) if isinstance(called, type) else called, "__code__", None)
        if code is not None:
            names = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self"}
            return did_you_mean(told[2], names)
    return ""

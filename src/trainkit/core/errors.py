"""The errors that a user can fix. Each class has an exit code that scripts can rely on."""

from __future__ import annotations

import re
import signal
import site
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trainkit.core.redaction import hide_secrets
from trainkit.core.spelling import did_you_mean
from trainkit.core.terminal import printable


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the cause in one line, and a hint that says how to fix it."""

    cause: str
    hint: str = ""

    def __str__(self) -> str:
        return printable(f"error: {self.cause}" + (f"\n  {self.hint}" if self.hint else ""))

    def without(self, secrets: Iterable[str]) -> Problem:
        """Return the problem with each secret replaced."""
        return Problem(hide_secrets(self.cause, secrets), hide_secrets(self.hint, secrets))


class TrainkitError(Exception):
    """The base class of all errors that a message explains completely, without a traceback.

    Args:
        problems: everything that is wrong; a string is the cause of one problem.
        hint: the hint of the problems that are given as strings.

    Attributes:
        exit_code: the exit code of the command that fails with this error.
    """

    exit_code = 1

    def __init__(self, *problems: Problem | str, hint: str = "") -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p, hint) for p in problems]
        super().__init__("\n".join(map(str, self.problems)))

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(TrainkitError):
    """The command line or the config is wrong. Holds every problem that was found.

    Attributes:
        composed: the incomplete config, in which further problems can be searched.
    """

    exit_code = 2
    composed: Any = None


class CheckpointError(TrainkitError):
    """There is no usable checkpoint, or it does not belong to this training."""

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
    """The run directory belongs to another run, or another process is using it."""

    exit_code = 7


class OutOfMemoryError(TrainkitError):
    """The device does not have enough memory."""

    exit_code = 8


class ExportError(TrainkitError):
    """A model cannot be exported, or its export does not agree with the model."""


class UserCodeError(TrainkitError):
    """Code that the config names raised an error. The message shows the frames of that code.

    Args:
        key: the config key that names the code, such as `model`.
        error: the error that was raised.
        exit_code: 2 while objects are built, 1 during training.
        details: more about where the error was raised.
        hint: the fix, if it is known.
    """

    def __init__(
        self, key: str, error: BaseException, *, exit_code: int = 2, details: str = "", hint: str = ""
    ) -> None:
        self.key, self.error, self.exit_code = key, error, exit_code
        lines = str(error).strip().splitlines() or ["no message"]
        notes = getattr(error, "__notes__", [])
        if "Original Traceback" in str(error):  # from a DataLoader worker: message and notes follow its traceback
            last = max((number for number, line in enumerate(lines) if _FRAME.match(line)), default=-1)
            lines = [line for line in lines[last + 1 :] if not line.startswith("    ")] or lines[-1:]
        name = type(error).__name__
        self.first_line = lines[0] if lines[0].startswith(name) else f"{name}: {lines[0]}"
        frames = user_frames(error)
        fix = f"fix that code, or change {key}" if frames else f"change {key}"
        hint = hint or _suggest_argument(error) or f"{fix}; TRAINKIT_TRACEBACK=1 shows the whole traceback"
        more = [line for line in (*lines[1:4], *notes, details, *frames) if line]
        super().__init__("\n  ".join([f"{key}: {self.first_line}", *more]), hint=hint)


@contextmanager
def named_errors(key: str) -> Iterator[None]:
    """Put a config key with its value before the cause of each `TrainkitError` that the block raises."""
    try:
        yield
    except TrainkitError as error:
        if not isinstance(error, UserCodeError):  # its message names a key of its own
            named = [p if p.cause.startswith(key) else Problem(f"{key}: {p.cause}", p.hint) for p in error.problems]
            error.problems = named
        raise


class Stopped(KeyboardInterrupt):
    """A signal requested the training to stop.

    Not an `Exception`, so `except Exception` cannot swallow it. The exit code is the shell's:
    128 + the signal's number. SIGUSR1 has 75, which asks a scheduler to start the job again.

    Attributes:
        pending: the stop that a signal requested outside of a training.
        saved: where the training was saved, and the command that continues it.
        summary: what the stop means for a sweep; it replaces `saved`.
    """

    pending: ClassVar[Stopped | None] = None

    def __init__(self, number: int) -> None:
        self.number, self.name = number, signal.Signals(number).name
        self.exit_code = 75 if self.name == "SIGUSR1" else 128 + number
        self.saved = self.summary = ""
        super().__init__(self.name)


# A frame in a traceback as text: the file, the line, the function and its code.
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)(?:\n    (.+))?', re.MULTILINE)


def describe_bug(error: BaseException) -> str:
    """Return the message for an error that is not a `TrainkitError`: its type, its text, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"error: {type(error).__name__}: {error}\n  at {frame.filename}, line {frame.lineno}; "
    return f"{printable(text)}set TRAINKIT_TRACEBACK=1 to see the whole traceback"


def user_frames(error: BaseException) -> list[str]:
    """Return the frames of the traceback that are in the user's code: not in trainkit, Python or a package."""
    foreign = _foreign_files()
    frames = [(f.filename, str(f.lineno), f.name, f.line) for f in traceback.extract_tb(error.__traceback__)]
    own = [
        f"{file}, line {line}, in {name}: {code}" for file, line, name, code in frames if not file.startswith(foreign)
    ]
    if "Original Traceback" in str(error):  # from a DataLoader worker
        own += frames_of_user(str(error))
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith(foreign):
        own.append(f"{error.filename}, line {error.lineno}: {(error.text or '').strip()}")
    return own


def frames_of_user(text: str) -> list[str]:
    """Return the frames in the user's code of a traceback that is part of a text."""
    found = _FRAME.findall(text)
    return [
        f"{file}, line {line}, in {name}: {code}"
        for file, line, name, code in found
        if not file.startswith(_foreign_files())
    ]


def _foreign_files() -> tuple[str, ...]:
    """Return the beginnings of the paths of files that are not the user's: trainkit, Python and packages."""
    return (str(Path(__file__).parents[1]), *site.getsitepackages(), sysconfig.get_path("stdlib"), "<")


def _suggest_argument(error: BaseException) -> str:
    """Return a hint with the nearest argument if a call got an argument that it does not accept, else ''."""
    match = re.match(r"(\S+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or match is None or error.__traceback__ is None:
        return ""
    name = match[1].removesuffix(".__init__").rpartition(".")[2]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        called = frame.f_globals.get(name)
        code = getattr(getattr(called, "__init__", None) if isinstance(called, type) else called, "__code__", None)
        if code is not None:
            names = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self"}
            return did_you_mean(match[2], names)
    return ""

"""Loggers: the hook that sends the metrics of each epoch, the config and the final status to other tools.

A logger never stops or changes a training: its calls run in a thread of their own with a time limit, an error turns
it off with a note, and the RNG states are restored after each call.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainkit.core.redaction import replace_secrets
from trainkit.core.rng import preserve_rng
from trainkit.runs.directory import Run
from trainkit.runs.untrusted import read_info
from trainkit.training.state import State

Values = dict[str, float]
FILE = "loggers.json"  # in the run directory: the id of the run for its loggers, and the last epoch of each logger
START_LIMIT, EPOCH_LIMIT, FINISH_LIMIT = 120.0, 30.0, 60.0  # seconds of a call
STOP_LIMIT = 10.0  # seconds of `finish` if a signal stopped the run, because a cluster kills the process soon


@dataclass(frozen=True)
class LoggedRun:
    """What a logger knows about a run when it starts.

    Attributes:
        directory: the run directory.
        id: identifies the run for ever; a resumed run has the same id.
        name: a short name of the run.
        group: the name of the sweep that the run belongs to, or None.
        config: the config with dotted keys and without secrets.
        epochs: the epochs that are done; 0 for a new run.
        logged: the last epoch that this logger got from an earlier process.
        resumed: whether an earlier process started this logger in this run.
    """

    directory: Path
    id: str
    name: str
    group: str | None
    config: dict[str, Any]
    epochs: int = 0
    logged: int = 0
    resumed: bool = False

    def path(self, given: str) -> Path:
        """Return a path of the config: inside the run directory, unless it is absolute."""
        return self.directory / Path(given).expanduser()


class Logger(Protocol):
    """The methods of a logger. A custom logger is any `_target_` with these methods."""

    def start(self, run: LoggedRun) -> int | None:
        """Start, or continue a resumed run.

        Returns:
            The last epoch that the tool holds, if it can say so; None: `run.logged`. The epochs after it follow.
        """

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the numbers of an epoch: those of its line in history.jsonl."""

    def finish(self, status: str, why: str | None) -> None:
        """Log how the run ended (completed, stopped or failed) and why, and close."""


class Loggers:
    """A hook that calls the loggers of a run.

    Args:
        run: the run.
        loggers: the loggers by name.
        config: the config with dotted keys and without secrets.
        report: is called with a note about a logger that failed.
    """

    def __init__(
        self, run: Run, loggers: Mapping[str, Logger], config: Mapping[str, Any], report: Callable[[str], None]
    ) -> None:
        self.run, self.config, self.report = run, config, report
        self.active = {name: _Caller(logger) for name, logger in loggers.items()}
        self.id, self.logged = "", {}  # type: str, dict[str, int]
        self.provisional: int | None = None  # the epoch that a longer run would continue

    def on_start(self, state: State) -> None:
        """Start the loggers, and send the epochs that a logger has missed."""
        if not self.active:
            return
        self.id, self.logged = self._read_file()
        known, epochs = dict(self.logged), state.progress.epoch
        name, group = names_of(self.run.directory)
        config = {key: self._hide(value) for key, value in self.config.items() if not key.startswith("_")}
        for logger in list(self.active):
            before = known.get(logger)
            about = LoggedRun(
                self.run.directory, self.id, name, group, config, epochs, before or 0, resumed=before is not None
            )
            held = self._call(logger, START_LIMIT, "start", about)
            if logger in self.active:
                self.logged[logger] = held if isinstance(held, int) else before or 0
        self._write_file()
        if epochs:
            self._send([row for row in self._history() if row["epoch"] <= epochs])

    def on_epoch_end(self, state: State, metrics: dict[str, Any]) -> None:
        """Send the numbers of the epoch."""
        if state.progress.is_provisional:  # a longer run replaces this epoch, so `loggers.json` does not list it
            self.provisional = metrics["epoch"]
        if self.active:
            self._send([metrics])

    def finish(self, status: str, why: str | None) -> None:
        """Send the epochs that are missing, and how the run ended. Call it before the run directory is unlocked."""
        if not self.active or not self.id:
            return
        self._send(self._history())
        limit = STOP_LIMIT if status == "stopped" else FINISH_LIMIT
        for logger in list(self.active):
            self._call(logger, limit, "finish", status, why and self.run.hide_secrets(why))
        for caller in self.active.values():
            caller.close()
        self.active = {}

    def _send(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send the rows to each logger that does not have them yet."""
        sent = False
        for row in rows:
            epoch = row["epoch"]
            for logger in [name for name in self.active if epoch > self.logged[name]]:
                self._call(logger, EPOCH_LIMIT, "log_epoch", epoch, numbers_of(row))
                if logger in self.active:
                    self.logged[logger], sent = epoch, True
        if sent:
            self._write_file()

    def _call(self, logger: str, limit: float, method: str, *args: Any) -> Any:
        """Call a method of a logger; turn the logger off if it fails."""
        try:
            with preserve_rng():
                return self.active[logger].call(method, args, limit)
        except Exception as error:
            self._turn_off(logger, error)
            return None

    def _turn_off(self, logger: str, error: Exception) -> None:
        del self.active[logger]
        cause = self.run.hide_secrets(" ".join(str(error).split()))
        cause = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
        cause = f"{cause[:300]}…" if len(cause) > 300 else cause
        self._note(f"note: logger.{logger} is off: {cause}; the training goes on, and a resume adds missing epochs")

    def _note(self, line: str) -> None:
        try:
            self.report(line)
        except Exception:  # a full disk, which the recorder of the run reports
            return

    def _hide(self, value: Any) -> Any:
        return replace_secrets(value, self.run.secrets) if isinstance(value, str) else value

    def _history(self) -> list[dict[str, Any]]:
        try:
            return self.run.history
        except Exception as error:
            self._note(f"note: the loggers cannot read the history: {error}")
            return []

    def _read_file(self) -> tuple[str, dict[str, int]]:
        """Return the id of the run for its loggers, and the last epoch of each logger; new ones without a file."""
        try:
            found = read_info(self.run.directory / FILE)
        except Exception as error:
            self._note(f"note: {FILE} is damaged, so the loggers start new runs: {error}")
            found = {}
        name, logged = found.get("id"), found.get("logged")
        if not isinstance(name, str) or not re.fullmatch(r"[0-9a-z]{8}", name) or not isinstance(logged, dict):
            return secrets.token_hex(4), {}
        return name, {key: epoch for key, epoch in logged.items() if type(epoch) is int and epoch >= 0}

    def _write_file(self) -> None:
        try:
            final = self.logged
            if self.provisional is not None:
                final = {name: min(epoch, self.provisional - 1) for name, epoch in self.logged.items()}
            self.run.write_json(FILE, {"id": self.id, "logged": final})
        except Exception as error:
            self._note(f"note: {FILE} cannot be written: {error}")


class _Caller:
    """Calls the methods of a logger, all in the same thread, so that a call that blocks can be given up."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def call(self, method: str, args: tuple[Any, ...], limit: float) -> Any:
        """Call a method and return its result.

        Raises:
            TimeoutError: the call took longer than `limit` seconds.
            Exception: the error that the method raised.
        """
        if self.thread is None:  # a daemon: the process does not wait for a call that blocks
            self.thread = threading.Thread(target=self._work, name="logger", daemon=True)
            self.thread.start()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.tasks.put((method, args, answer))
        try:
            result, error = answer.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError(f"{method} has not returned after {limit:g} s") from None
        if isinstance(error, Exception):
            raise error
        if error is not None:  # such as SystemExit
            raise RuntimeError(f"{method} raised {type(error).__name__}: {error}") from error
        return result

    def close(self) -> None:
        """End the thread."""
        self.tasks.put(None)

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            method, args, answer = task
            try:
                answer.put((getattr(self.logger, method)(*args), None))
            except BaseException as error:
                answer.put((None, error))


def numbers_of(row: Mapping[str, Any]) -> Values:
    """Return the numbers in a row of the history."""
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}


def names_of(directory: Path) -> tuple[str, str | None]:
    """Return a name for the run in a directory, and the name of its sweep; None if it is not the job of a sweep."""
    above = directory.parent
    if not any((above / name).exists() for name in ("sweep.jsonl", "multirun.yaml")):
        return _short_name(directory), None
    return f"{_short_name(above)}-{directory.name}", _short_name(above)


def _short_name(directory: Path) -> str:
    """Return the name of a directory, with its date if the name is a time."""
    is_time = re.fullmatch(r"\d\d-\d\d-\d\d(?:_\d+)?", directory.name)
    return f"{directory.parent.name}_{directory.name}" if is_time else directory.name


def plain(value: Any) -> str | float:
    """Return a config value as tools store it: a number, or a text."""
    if isinstance(value, bool) or value is None or not isinstance(value, str | int | float):
        return json.dumps(value, default=str)
    return value

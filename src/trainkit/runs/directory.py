"""The directory of a run: its config, status, history and log."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper

from trainkit.config.settings import Settings
from trainkit.core.atomic import atomic_write_text, sync_directory
from trainkit.core.errors import CheckpointError, RunDirectoryInUseError, StorageError
from trainkit.core.paths import display_path, other_directory, storage_error
from trainkit.core.redaction import find_secrets, redact_by_key, redact_command_line, redact_copies, replace_secrets
from trainkit.core.terminal import printable
from trainkit.display.text import as_json
from trainkit.runs.history import History, digest_of, history_line
from trainkit.runs.lock import Lock
from trainkit.runs.provenance import now, process_facts
from trainkit.runs.secrets import literal_secrets, secrets_of
from trainkit.runs.untrusted import HINT, read_info, read_overrides, read_yaml, sha256_of


class Run:
    """A run: a directory with `.hydra/`, `run.json`, `history.jsonl`, `trainkit.log` and `checkpoints/`.

    Args:
        directory: created by `claim_directory`.
        lock: the lock of the directory, if this process holds it already.
    """

    def __init__(self, directory: Path, lock: Lock | None = None) -> None:
        self.directory = directory.absolute()  # stays valid if the working directory changes
        self.info: dict[str, Any] = {}  # the content of run.json
        self.lock = lock or Lock(directory)
        self.history_file = History(self.directory / "history.jsonl")
        self.log_file: TextIO | None = None
        self.secrets: set[str] = set()  # texts that no file may contain
        self.history_text = ""  # the lines of the history, as this process wrote or verified them
        self.report: Path | None = None  # the report that this process wrote
        self.damage = ""  # what is wrong with run.json, if it must be rebuilt; see `recover_run`

    @classmethod
    def load(cls, directory: Path, lock: Lock | None = None) -> Run:
        """Return the run in a directory; its `info` is empty if the run never started.

        Raises:
            CheckpointError: `run.json` is damaged.
        """
        run = cls(directory, lock)
        run.info = read_info(directory / "run.json")
        return run

    @property
    def config(self) -> DictConfig:
        """The saved config, with its interpolations, without its secrets.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = self.directory / ".hydra" / "config.yaml"
        try:
            config = read_yaml(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing", hint=HINT) from error
        if not isinstance(config, DictConfig):
            raise CheckpointError(f"{path} is not a config", hint=HINT)
        return config

    @property
    def overrides(self) -> list[str]:
        """The overrides of the command line that started the run."""
        return read_overrides(self.directory / ".hydra" / "overrides.yaml")

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch."""
        return self.history_file.rows

    @property
    def best(self) -> dict[str, Any] | None:
        """The metrics of the epoch with the best monitored value."""
        best: dict[str, Any] | None = self.info.get("best")
        return best

    # ------------------------------------------------------------------------ the course of a run

    def start(
        self,
        settings: Settings,
        *,
        command: Sequence[str],
        overrides: Sequence[str] = (),
        hydra: DictConfig | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Lock the directory and write what is about to run; `run.json` comes last.

        Args:
            settings: the settings of the run.
            command: `sys.argv`.
            overrides: the overrides of the command line.
            hydra: Hydra's own settings.
            facts: more entries for `run.json`.

        Raises:
            RunDirectoryInUseError: another process uses the directory.
            StorageError: the directory cannot be written.
        """
        self.acquire()
        if (self.directory / "run.json").exists():
            self.lock.release()
            cause = f"{self.directory} holds a run already"
            raise RunDirectoryInUseError(cause, hint=other_directory(self.directory))
        files = self._config_files(settings.source, overrides, hydra)
        self._write_config_files(files)
        self._open_log()
        self.info = {
            "status": "running",
            "exit_code": None,
            "why": None,
            "command": self._redact(command),
            "started": now(),
            "ended": None,
            "best": None,
            "folder": str(Path.cwd()),
            "config_sha256": [digest_of(files["config"])],
            **process_facts(),
            **(facts or {}),
        }
        self.write_info()
        self._sync_names()

    def resume(
        self,
        settings: Settings,
        *,
        command: Sequence[str],
        overrides: Sequence[str],
        history: str,
        at: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        """Write that the run continues. The directory is locked already. A damaged `run.json` is rebuilt.

        Args:
            settings: the settings of the run from now on.
            command: `sys.argv`.
            overrides: the overrides of all command lines so far.
            history: the lines of the history up to the checkpoint.
            at: the checkpoint that the run continues from, an entry of `resumed` in `run.json`.
            facts: the entries of `run.json` that the session and the checkpoint give.

        Raises:
            StorageError: the directory cannot be written.
        """
        self._open_log()
        files = self._config_files(settings.source, overrides)
        digest = digest_of(files["config"])
        resumed = [*self.info.get("resumed", []), {"at": now(), "command": self._redact(command), **at}]
        rebuilt: dict[str, Any] = {"command": [], "started": None, "folder": str(Path.cwd())}
        status = {"status": "running", "exit_code": None, "why": None, "ended": None}
        recorded = {**status, **process_facts(), **facts, "resumed": resumed, "history_sha256": digest_of(history)}
        # A kill between the next two writes leaves the config as it is now.
        recorded["config_sha256"] = [*dict.fromkeys([sha256_of(self.directory / ".hydra/config.yaml"), digest])]
        self.info = {**rebuilt, **self.info, **recorded}
        self.write_info()  # before the config: it lists what may differ from the checkpoint
        self._write_config_files(files)
        self.info["config_sha256"] = [digest]  # on the disk with the next epoch
        self.write_history(history)
        self._sync_names()

    def write_history(self, text: str) -> None:
        """Replace the lines of the history."""
        with self._storage_errors():
            self.history_file.write(text)
        self.history_text = text

    def finish(self, status: str, exit_code: int, why: str | None = None) -> None:
        """Write how the run ended (completed, stopped or failed), and unlock the directory.

        Raises:
            StorageError: the directory cannot be written.
        """
        if not self.lock.is_intact:  # another process may write to the directory
            self._close()
            return
        why = why and self.hide_secrets(why)
        self.info |= {"status": status, "exit_code": exit_code, "why": why, "ended": now()}
        try:
            try:
                self.write_info()
            except StorageError:  # a full disk may still have room in the old file
                with contextlib.suppress(OSError):
                    (self.directory / "run.json").write_text(as_json(self.info) + "\n", encoding="utf-8")
                raise
            self.log(f"{status}" + (f": {why}" if why else ""))
        finally:
            self._close()

    def _close(self) -> None:
        if self.log_file is not None:
            with contextlib.suppress(OSError):
                self.log_file.close()
            self.log_file = None
        self.lock.release()

    def acquire(self) -> None:
        """Lock the directory until `finish`.

        Raises:
            RunDirectoryInUseError: another process uses the directory.
            StorageError: the lock cannot be written.
        """
        try:
            self.lock.acquire()
        except OSError as error:
            raise storage_error(self.directory, error) from error

    # --------------------------------------------------------------------------- the files of a run

    def write_config(self, config: DictConfig, overrides: Sequence[str], hydra: DictConfig | None = None) -> None:
        """Write the config, the overrides and Hydra's settings into `.hydra/`, without secrets."""
        self._write_config_files(self._config_files(config, overrides, hydra))

    def _config_files(
        self, config: DictConfig, overrides: Sequence[str], hydra: DictConfig | None = None
    ) -> dict[str, str]:
        """Return the contents of the files in `.hydra/` by their names."""
        self.secrets |= secrets_of(config)
        plain: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        # A value that contains a secret must be given again, so it is replaced completely.
        nodes = {"config": redact_copies(redact_by_key(plain), literal_secrets(config))}
        if hydra is not None:
            plain = OmegaConf.to_container(hydra, resolve=False, enum_to_str=True)
            self.secrets |= set(find_secrets(plain))
            nodes["hydra"] = redact_command_line(redact_by_key({"hydra": plain}), self.secrets)
        nodes["overrides"] = redact_by_key(self._redact(overrides))
        return {name: _to_yaml(node) for name, node in nodes.items()}

    def _write_config_files(self, texts: Mapping[str, str]) -> None:
        try:
            (self.directory / ".hydra").mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(self.directory, error) from error
        for name, text in texts.items():
            self._write_text(f".hydra/{name}.yaml", text)
        with self._storage_errors():
            sync_directory(self.directory / ".hydra")

    def write_info(self) -> None:
        """Write `run.json`."""
        self.write_json("run.json", self.info)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file into the directory, completely or not at all."""
        self._write_text(name, as_json(content) + "\n")

    def append_epoch(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
        """Add the metrics of an epoch to the history, and the best epoch to `run.json`."""
        self.lock.check()
        line = history_line(metrics)
        with self._storage_errors():
            self.history_file.append(line)
        self.history_text += line
        self.info |= {"best": best and dict(best), "history_sha256": digest_of(self.history_text)}
        self.write_info()

    def hide_secrets(self, text: str) -> str:
        """Return the text of an error without the secrets of the run, also without the short ones."""
        return replace_secrets(text, self.secrets, short=True)

    def log(self, line: str) -> None:
        """Add a line to `trainkit.log`, with the time."""
        if self.log_file is not None:
            with self._storage_errors():
                self.log_file.write(f"{now()} {printable(replace_secrets(line, self.secrets))}\n")
                self.log_file.flush()

    def _open_log(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        flags |= getattr(os, "O_NONBLOCK", 0)  # opening a pipe would block
        with self._storage_errors():
            descriptor = os.open(self.directory / "trainkit.log", flags, 0o644)
            self.log_file = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def _sync_names(self) -> None:
        """Wait until the disk has the names of the directory and of its files."""
        with self._storage_errors():
            sync_directory(self.directory)
            sync_directory(self.directory.parent)

    def _write_text(self, name: str, text: str) -> None:
        with self._storage_errors():
            atomic_write_text(self.directory / name, text)

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turn an OSError into a `StorageError` with the command that resumes the run."""
        try:
            yield
        except OSError as error:
            if not self.info:  # the run has not started
                raise storage_error(self.directory, error) from error
            path = display_path(self.directory)
            hint = f"free space on the disk, then trainkit resume {shlex.quote(path)}"
            raise StorageError(f"{path} cannot be written: {error.strerror or error}", hint=hint) from error

    def _redact(self, words: Sequence[str]) -> list[str]:
        return [str(word) for word in redact_command_line(list(words), self.secrets)]


def _to_yaml(node: Any) -> str:
    """Return the text of `OmegaConf.to_yaml` for plain containers, without the slow conversion to a config."""
    dumper = get_omega_conf_dumper()
    text: str = yaml.dump(node, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=dumper)
    return text

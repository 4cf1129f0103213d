"""A run's directory: its config, its history line by line, its status."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError, ConfigError, RunDirectoryInUseError, StorageError
from trainkit.core.paths import display_path, storage_error
from trainkit.core.redaction import (
    environment_secrets,
    find_secrets,
    redact_by_key,
    redact_command_line,
    replace_secrets,
)
from trainkit.runs.lock import Lock


def find_run(name: str) -> Path:
    """The run directory that a command line names: its path, or `last`.

    Raises:
        ConfigError: there is none, or it is a sweep's, whose runs are named then.
    """
    directory = Path("outputs/latest") if name == "last" else Path(name)
    if not directory.is_dir():
        there = sorted(str(file.parent) for file in Path("outputs").glob("*/*/run.json"))
        hint = f"the newest here is {there[-1]}" if there else "name a run's directory; there is none under outputs/"
        raise ConfigError(f"{directory}: there is no such directory", hint=hint)
    if (directory / "run.json").exists():
        return directory.resolve() if name == "last" else directory
    inside = sorted(file.parent for file in directory.resolve().glob("*/run.json"))
    open_ones = [run for run in inside if Run.load(run).info.get("status") != "completed"]
    if open_ones:
        hint = "resume them one by one: " + "; ".join(
            f"trainkit resume {shlex.quote(display_path(run))}" for run in open_ones[:8]
        )
        raise ConfigError(f"{directory} holds several runs ({len(open_ones)} unfinished)", hint=hint)
    if inside:
        cause = f"{directory} holds several runs; those that were begun are finished"
        raise ConfigError(cause, hint=f"name one of them: {shlex.quote(display_path(inside[0]))}")
    raise ConfigError(f"{directory} holds no run: no training was begun there", hint="start one: trainkit …")


class Run:
    """One run: a directory with `.hydra/`, `run.json`, `history.jsonl`, `trainkit.log` and `checkpoints/`.

    Args:
        directory: made by `claim`.
    """

    def __init__(self, directory: Path, lock: Lock | None = None) -> None:
        self.directory = directory.absolute()  # whatever the working directory becomes
        self.info: dict[str, Any] = {}
        self.log: TextIO | None = None
        self.lock = lock or Lock(directory)
        self.secrets: set[str] = set()  # which no file may hold

    @classmethod
    def load(cls, directory: Path, lock: Lock | None = None) -> Run:
        """A run as its directory tells of it; its `info` is empty where it never began."""
        run = cls(directory, lock)
        path = directory / "run.json"
        if path.exists():
            try:
                run.info = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(run.info, dict):
                    raise ValueError("it holds no object")
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path} is damaged: {error}", hint="mend it, or write {} into it") from error
        return run

    @property
    def config(self) -> DictConfig:
        """The config that ran, with its interpolations, without its secrets.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self.directory / ".hydra" / "config.yaml"
        try:
            config = OmegaConf.load(path)
        except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"{path} cannot be read: {text}", hint="put it back, or start a new run") from error
        if not isinstance(config, DictConfig):
            raise CheckpointError(f"{path} is no config", hint="put it back, or start a new run")
        return config

    @property
    def overrides(self) -> list[str]:
        """The command line's overrides that made it."""
        path = self.directory / ".hydra" / "overrides.yaml"
        try:  # they may hold interpolations, which are for the config to resolve
            listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return []
        return list(map(str, listed)) if isinstance(listed, list) else []

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch so far."""
        return [row for _, row in self._rows()]

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines of the history with what they say; the last may have been cut off by a kill."""
        path = self.directory / "history.jsonl"
        found: list[tuple[str, dict[str, Any]]] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            epoch = row.get("epoch") if isinstance(row, dict) else None
            if isinstance(epoch, int) and epoch > (found[-1][1]["epoch"] if found else 0):  # each once, in order
                found.append((line, row))
        return found

    @property
    def best(self) -> dict[str, Any] | None:
        """The metrics of the epoch with the best monitored value."""
        best: dict[str, Any] | None = self.info.get("best")
        return best

    def start(
        self,
        settings: Settings,
        *,
        command: Sequence[str],
        overrides: Sequence[str] = (),
        hydra: DictConfig | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the directory, and write down what is about to run there; `run.json` last.

        Raises:
            RunDirectoryInUseError: another process has taken it meanwhile.
            StorageError: it cannot be written.
        """
        self.acquire()
        if (self.directory / "run.json").exists():
            self.lock.release()
            raise RunDirectoryInUseError(f"{self.directory} holds a run already", hint="choose another directory")
        self.record(settings.source, overrides, hydra)
        self._open_log()
        self.info = {
            "status": "running",
            "exit_code": None,
            "why": None,
            "command": self._clean(command),
            "started": _now(),
            "ended": None,
            "best": None,
            "folder": str(Path.cwd()),
            **_here(),
            **(facts or {}),
        }
        self.save()

    def resume(
        self, settings: Settings, *, command: Sequence[str], overrides: Sequence[str], epoch: int, at: Mapping[str, Any]
    ) -> None:
        """Write down that it goes on, with the history up to `epoch`; `at` says from where. It is locked already.

        Raises:
            StorageError: it cannot be written.
        """
        self._open_log()
        rows = [line for line, row in self._rows() if row["epoch"] <= epoch]
        resumed = [*self.info.get("resumed", []), {"at": _now(), "command": self._clean(command), **at}]
        self.info |= {"status": "running", "exit_code": None, "why": None, "ended": None, **_here(), "resumed": resumed}
        self.save()  # before the config: it says what is allowed to differ from the checkpoint
        self.record(settings.source, overrides)
        self._replace("history.jsonl", "".join(f"{line}\n" for line in rows))

    def acquire(self) -> None:
        """Be the one process at work in the directory, until `finish`.

        Raises:
            RunDirectoryInUseError: another is.
            StorageError: it cannot be written.
        """
        try:
            self.lock.acquire()
        except OSError as error:
            raise storage_error(self.directory, error) from error

    def record(self, config: DictConfig, overrides: Sequence[str], hydra: DictConfig | None = None) -> None:
        """Write the config and how it came about into `.hydra/`, interpolations as they are, without secrets."""
        self.secrets |= self.secrets_of(config)
        if hydra is not None:
            self.secrets |= set(find_secrets(OmegaConf.to_container(hydra, resolve=False)))
        content: dict[str, Any] = {"config": config, "overrides": self._clean(overrides)}
        if hydra is not None:
            content["hydra"] = {"hydra": hydra}
        try:
            (self.directory / ".hydra").mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(self.directory, error) from error
        for name, node in content.items():
            plain = redact_by_key(OmegaConf.to_container(OmegaConf.create(node), resolve=False))
            # In the config itself a secret may be a part of other words, which a resumed run needs as they are.
            node = plain if name == "config" else redact_command_line(plain, self.secrets)
            text = OmegaConf.to_yaml(OmegaConf.create(node))
            self._replace(f".hydra/{name}.yaml", text)

    def secrets_of(self, config: DictConfig) -> set[str]:
        """The secrets that a config holds or refers to."""
        return {
            *find_secrets(OmegaConf.to_container(config, resolve=False)),
            *find_secrets(_resolved(config)),
            *environment_secrets(OmegaConf.to_yaml(config)),
        }

    def append(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
        """Add an epoch's metrics to the history."""
        try:
            with (self.directory / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self.info["best"] = best and dict(best)
        self.save()

    def note(self, line: str) -> None:
        """Add a line to `trainkit.log`, with the time."""
        if self.log is not None:
            try:
                self.log.write(f"{_now()} {replace_secrets(line, self.secrets)}\n")
                self.log.flush()
            except OSError as error:
                raise self._unwritable(error) from error

    def finish(self, status: str, exit_code: int, why: str | None = None) -> None:
        """Write down how it ended: completed, stopped or failed; let go of the directory."""
        why = why and replace_secrets(why, self.secrets)
        self.info |= {"status": status, "exit_code": exit_code, "why": why, "ended": _now()}
        try:
            try:
                self.save()
            except StorageError:  # a full disk may still have the old one's place
                with contextlib.suppress(OSError):
                    (self.directory / "run.json").write_text(_json(self.info), encoding="utf-8")
                raise
            self.note(f"{status}" + (f": {why}" if why else ""))
        finally:
            if self.log is not None:
                with contextlib.suppress(OSError):
                    self.log.close()
                self.log = None
            self.lock.release()

    def save(self) -> None:
        """Write `run.json` as it is now."""
        self.write("run.json", self.info)

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file into the directory, as a whole or not at all."""
        self._replace(name, _json(content))

    def _replace(self, name: str, text: str) -> None:
        path = self.directory / name
        fresh = path.with_name(f".{path.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            with fresh.open("x", encoding="utf-8") as file:  # never through a link that lies there
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise

    def _open_log(self) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            self.log = os.fdopen(os.open(self.directory / "trainkit.log", flags, 0o644), "a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StorageError:
        if not self.info:  # nothing has begun
            return storage_error(self.directory, error)
        hint = f"free or mend that disk, then trainkit resume {shlex.quote(display_path(self.directory))}"
        return StorageError(f"{display_path(self.directory)} cannot be written: {error.strerror or error}", hint=hint)

    def _clean(self, words: Sequence[str]) -> list[str]:
        return [str(word) for word in redact_command_line(list(words), self.secrets)]


def redact_file(path: Path, secrets: set[str]) -> None:
    """Take the secrets out of a YAML file that Hydra wrote."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    clean = redact_command_line(redact_by_key(content), secrets | set(find_secrets(content)))
    if clean != content:
        path.write_text(yaml.safe_dump(clean, sort_keys=False), encoding="utf-8")


def _resolved(config: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # something that only the data tells
        return {}


def _here() -> dict[str, Any]:
    """What `run.json` tells of the process."""
    return {"versions": versions(), "host": socket.gethostname(), "pid": os.getpid(), "git_commit": git_commit()}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, default=str) + "\n"


def versions() -> dict[str, str]:
    """The versions of what numbers depend on."""
    packages = ("trainkit", "torch", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def git_commit() -> str | None:
    """The commit of the working directory's repository, `+` behind it if files differ; None outside one."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

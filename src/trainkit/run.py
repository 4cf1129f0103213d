"""A run's directory: its config, its history line by line, its status."""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from trainkit.errors import RunDirectoryInUseError, StorageError


def claim(path: Path, *, exact: bool = False) -> Path:
    """Make a directory that nobody else has: `path`, or `path_1`, `path_2`, … where it exists.

    Args:
        path: the directory.
        exact: take `path` itself or nothing; it may exist as long as it holds no run.

    Raises:
        RunDirectoryInUseError: `exact`, and it holds a run.
        StorageError: it cannot be made.
    """
    suffix = 0
    while True:
        candidate = path if suffix == 0 else path.with_name(f"{path.name}_{suffix}")
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(candidate.parent, error) from error
        try:
            candidate.mkdir()
        except FileExistsError as error:
            if not exact:
                suffix += 1
                continue
            if not candidate.is_dir():
                raise unwritable(candidate, error) from error
        except OSError as error:
            raise unwritable(candidate, error) from error
        holds = [name for name in ("run.json", "multirun.yaml", "find_lr.json") if (candidate / name).exists()]
        if holds:
            raise RunDirectoryInUseError(
                f"{candidate} holds a run already ({holds[0]})", mend="choose another directory"
            )
        return candidate


def default_directory() -> Path:
    """Where a run lands if nothing else is said: outputs/<date>/<time>."""
    return Path("outputs") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"


def point_latest(directory: Path, outputs: Path) -> None:
    """Let `outputs/latest` point at a directory inside `outputs` (where links can be made)."""
    link, fresh = outputs / "latest", outputs / f".latest-{os.getpid()}"
    try:
        if link.is_symlink() or not link.exists():
            fresh.symlink_to(directory.relative_to(outputs), target_is_directory=True)
            fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)


class Run:
    """One run: a directory with `.hydra/`, `run.json`, `history.jsonl` and `trainkit.log`.

    Args:
        directory: made by `claim`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info: dict[str, Any] = {}
        self.log: TextIO | None = None

    @classmethod
    def load(cls, directory: Path) -> Run:
        """A run as its directory tells of it; its `info` is empty where it never began."""
        run = cls(directory)
        path = directory / "run.json"
        run.info = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return run

    @property
    def overrides(self) -> list[str]:
        """The command line's overrides that made it."""
        path = self.directory / ".hydra" / "overrides.yaml"
        return [str(override) for override in OmegaConf.load(path)] if path.exists() else []

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch so far."""
        path = self.directory / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def best(self) -> dict[str, Any] | None:
        """The metrics of the epoch with the best monitored value."""
        best: dict[str, Any] | None = self.info.get("best")
        return best

    def start(
        self,
        config: DictConfig,
        *,
        command: Sequence[str],
        overrides: Sequence[str] = (),
        hydra: DictConfig | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down what is about to run."""
        try:
            folder = self.directory / ".hydra"
            folder.mkdir(exist_ok=True)
            OmegaConf.save(config, folder / "config.yaml")
            OmegaConf.save(OmegaConf.create(list(overrides)), folder / "overrides.yaml")
            if hydra is not None:
                OmegaConf.save(OmegaConf.create({"hydra": hydra}), folder / "hydra.yaml")
            self.log = (self.directory / "trainkit.log").open("a", encoding="utf-8")
        except OSError as error:
            raise unwritable(self.directory, error) from error
        self.info = {
            "status": "running",
            "exit_code": None,
            "why": None,
            "command": list(command),
            "started": _now(),
            "ended": None,
            "best": None,
            "versions": versions(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "git_commit": git_commit(),
            **(facts or {}),
        }
        self.save()

    def append(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
        """Add an epoch's metrics to the history."""
        try:
            with (self.directory / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise unwritable(self.directory, error) from error
        self.info["best"] = best and dict(best)
        self.save()

    def note(self, line: str) -> None:
        """Add a line to `trainkit.log`, with the time."""
        if self.log is not None:
            self.log.write(f"{_now()} {line}\n")
            self.log.flush()

    def finish(self, status: str, exit_code: int, why: str | None = None) -> None:
        """Write down how it ended: completed, stopped or failed."""
        self.info |= {"status": status, "exit_code": exit_code, "why": why, "ended": _now()}
        self.note(f"{status}" + (f": {why}" if why else ""))
        if self.log is not None:
            self.log.close()
            self.log = None
        self.save()

    def save(self) -> None:
        """Write `run.json` as it is now."""
        self.write("run.json", self.info)

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file into the directory, as a whole or not at all."""
        path = self.directory / name
        fresh = path.with_name(f".{name}.new")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, default=str)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise unwritable(self.directory, error) from error


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


def unwritable(path: Path, error: OSError) -> StorageError:
    """What is raised where nothing can be written."""
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}",
        mend="free or mend that disk, or choose another directory: hydra.run.dir=DIR (a sweep's: hydra.sweep.dir)",
    )

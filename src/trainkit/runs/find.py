"""Find the run that a command line names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.core.paths import display_path
from trainkit.runs.directory import Run


def find_run(name: str) -> Path:
    """Return the run directory that a command line names: a path, or `last`.

    Raises:
        ConfigError: the name is empty, or the directory does not exist, does not hold a run, or holds several runs;
            these are listed.
    """
    if not name:  # as a path, it would be the working directory
        raise ConfigError("the name of the run is empty", hint="name the directory of a run, or write last")
    directory = Path("outputs/latest") if name == "last" else Path(name)
    if not directory.is_dir():
        found = sorted(str(file.parent) for file in Path("outputs").glob("*/*/run.json"))
        hint = f"the newest here is {found[-1]}" if found else "name the directory of a run; outputs/ holds none"
        raise ConfigError(f"{directory}: this directory does not exist", hint=hint)
    if any((directory / name).exists() for name in ("run.json", "checkpoints", "sweep.jsonl")):
        return directory.resolve() if name == "last" else directory
    inside = sorted(file.parent for file in directory.resolve().glob("*/run.json"))
    unfinished = [run for run in inside if _status(run) != "completed"]
    if unfinished:
        commands = [f"trainkit resume {shlex.quote(display_path(run))}" for run in unfinished[:8]]
        hint = "resume them one by one: " + "; ".join(commands)
        raise ConfigError(f"{directory} holds several runs ({len(unfinished)} unfinished)", hint=hint)
    if inside:
        hint = f"to train one of them longer: trainkit resume {shlex.quote(display_path(inside[0]))} epochs=N"
        raise ConfigError(f"{directory} holds several runs, and all that started are finished", hint=hint)
    below = [file.parent for depth in ("*", "*/*", "*/*/*") for file in directory.glob(f"{depth}/sweep.jsonl")]
    below = below or [file.parent for file in directory.glob("*/*/run.json")]
    hint = f"the newest there is {display_path(max(below))}" if below else "start a run: trainkit …"
    above = [parent for parent in directory.resolve().parents[:2] if (parent / "run.json").exists()]
    hint = f"it is a part of the run {display_path(above[0])}" if above else hint
    raise ConfigError(f"{directory} does not hold a run: no training started there", hint=hint)


def find_last_run() -> Path:
    """Return the directory of the newest run, for a key such as `init_from=last`.

    Raises:
        ConfigError: there is no run, or the newest is a sweep.
    """
    directory = find_run("last")
    if (directory / "sweep.jsonl").exists():
        cause = f"the newest is a sweep, {display_path(directory)}"
        raise ConfigError(cause, hint="name the directory of a run, such as that of one of its jobs")
    return directory


def newest_run_with(checkpoint: str) -> Path | None:
    """Return the newest run in `outputs` that has a checkpoint `best` or `last`; None if there is none."""
    found = Path("outputs").glob(f"[0-9]*/*/checkpoints/{checkpoint}")
    return max((file.parents[1] for file in found), default=None)


def checkpoint_step(checkpoint: str) -> int | None:
    """Return the N of a checkpoint that a command line names `step-N`; None for `best` and `last`.

    Raises:
        ConfigError: it is none of these.
    """
    step = re.fullmatch(r"step-(\d{1,18})", checkpoint)
    if step is None and checkpoint not in ("best", "last"):
        raise ConfigError(f"checkpoint={checkpoint}: there is no such choice", hint="write best, last or step-N")
    return None if step is None else int(step[1])


def _status(directory: Path) -> Any:
    """Return the status of a run; `damaged` if its `run.json` cannot be read."""
    try:
        return Run.load(directory).info.get("status")
    except CheckpointError:
        return "damaged"

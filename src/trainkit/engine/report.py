"""The report of a run: `report.html` and `curves.png` in its directory. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.config.defaults import differences
from trainkit.config.settings import Settings
from trainkit.core.atomic import atomic_write, atomic_write_text
from trainkit.core.errors import CheckpointError, TrainkitError
from trainkit.core.paths import display_path, storage_error
from trainkit.core.terminal import printable
from trainkit.display.charts import Chart, draw_png
from trainkit.display.run_report import RunFacts, run_page
from trainkit.display.text import count
from trainkit.runs.directory import Run
from trainkit.runs.saved_config import read_choices, read_saved_config
from trainkit.runs.status import status_of
from trainkit.runs.untrusted import MAX_INFO_BYTES, read_bytes, read_end, read_overrides

REPORT, CURVES = "report.html", "curves.png"
SWEEP_FILES = ("sweep.jsonl", "multirun.yaml")  # in the directory of a sweep
IMPORT_SECONDS, DRAWING_SECONDS = 2.0, 2.0  # of matplotlib, and of a report
MAX_SHARE = 0.05  # of the time of a run, that its report may take


def write_run_report(run: Run | Path) -> Path:
    """Write the report of a run into its directory; return the path of `report.html`.

    Damaged and missing files are named in the report.

    Raises:
        StorageError: the directory cannot be written.
    """
    facts = run_facts(run.directory if isinstance(run, Run) else run)
    directory = run.directory if isinstance(run, Run) else run
    return write_files(directory, run_page(facts), facts.charts)


def write_files(directory: Path, page: str, charts: Sequence[Chart]) -> Path:
    """Write a page and its charts as a picture; return the path of the page.

    Raises:
        StorageError: the directory cannot be written.
    """
    try:
        if charts:
            picture = draw_png(charts)
            atomic_write(directory / CURVES, lambda file: file.write(picture))
        atomic_write_text(directory / REPORT, page)
    except OSError as error:
        raise storage_error(directory, error) from error
    return directory / REPORT


def report_at_end(run: Run, settings: Settings, started: float) -> None:
    """Write the report of a run that has ended, if the key `report` asks for it. A failure is a note.

    Args:
        run: that has ended.
        settings: the settings of the run.
        started: when the process began the training, from `time.monotonic`.
    """
    if settings.report is None:
        return
    if settings.report == "auto" and (is_job(run.directory) or not is_cheap(time.monotonic() - started)):
        return
    run.report = write_or_note(lambda: write_run_report(run))


def write_or_note(write: Callable[[], Path]) -> Path | None:
    """Return the report that a function writes. If it fails, print a note and return None: the training is complete."""
    try:
        return write()
    except Exception as error:
        cause = error.problems[0].cause if isinstance(error, TrainkitError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            print(printable(f"note: the report could not be written: {cause}"), file=sys.stderr)
        return None


def is_cheap(seconds: float) -> bool:
    """Return whether a report would take at most `MAX_SHARE` of a run of so many seconds."""
    cost = DRAWING_SECONDS + (0 if "matplotlib.figure" in sys.modules else IMPORT_SECONDS)
    return cost <= MAX_SHARE * seconds


def is_job(directory: Path) -> bool:
    """Return whether a run is a job of a sweep, which has a report of its own."""
    return any((parent / name).exists() for parent in directory.absolute().parents[:4] for name in SWEEP_FILES)


# ------------------------------------------------------------------------------------ what the files say


def run_facts(directory: Path) -> RunFacts:
    """Return what the files of a run say. What is missing or damaged is listed."""
    missing: list[str] = []
    reader = _Reader(directory, missing)
    run = Run(directory)
    try:
        run = Run.load(directory)
    except CheckpointError as error:
        missing.append(error.problems[0].cause)
    if not run.info and not missing:
        missing.append("run.json: the run has not started, or the file was deleted")
    elif "status" not in run.info and not missing:
        missing.append("run.json: it has no status")
    status, why = status_of(directory, run.info) if "status" in run.info else ("unknown", "")
    history = reader.history(run)
    config = reader.text(".hydra/config.yaml")
    base, changed = reader.differences()
    return RunFacts(
        name=display_path(directory.resolve()),
        info={**run.info, "status": status, "why": why},
        history=history,
        params=reader.params(),
        overrides=reader.overrides(),
        config=config,
        base=base,
        differences=changed,
        log=reader.text("trainkit.log").splitlines(),
        missing=missing,
    )


class _Reader:
    """Reads files of a run. What cannot be read becomes a line in `missing`.

    Args:
        directory: the directory of the run.
        missing: gets the lines.
    """

    def __init__(self, directory: Path, missing: list[str]) -> None:
        self.directory, self.missing = directory, missing

    def text(self, name: str) -> str:
        """Return the end of a text file."""
        try:
            return read_end(self.directory / name)
        except FileNotFoundError:
            self.missing.append(name)
        except CheckpointError as error:
            self.missing.append(error.problems[0].cause)
        return ""

    def history(self, run: Run) -> list[dict[str, Any]]:
        """Return the metrics of each epoch."""
        try:
            rows = run.history
        except CheckpointError as error:
            self.missing.append(error.problems[0].cause)
            return []
        if not rows:
            exists = (self.directory / "history.jsonl").exists()
            self.missing.append("history.jsonl" + (" has no valid line" if exists else ": no epoch has ended"))
            return []
        damaged = len([line for line in self.text("history.jsonl").splitlines() if line.strip()]) - len(rows)
        if damaged > 0:
            self.missing.append(f"history.jsonl: {count(damaged, 'line')} cannot be read")
        return finite_history(rows)

    def overrides(self) -> list[str]:
        """Return the overrides of the command line."""
        try:
            return read_overrides(self.directory / ".hydra" / "overrides.yaml")
        except CheckpointError:
            return []

    def params(self) -> list[Mapping[str, Any]]:
        """Return the rows of `params.json`."""
        try:
            rows = json.loads(read_bytes(self.directory / "params.json", MAX_INFO_BYTES))
            if not isinstance(rows, list) or not all(map(_is_param, rows)):
                raise ValueError("it does not list parameters")
        except FileNotFoundError:
            self.missing.append("params.json: the param groups")
            return []
        except (ValueError, RecursionError, CheckpointError) as error:
            cause = (
                error.problems[0].cause if isinstance(error, CheckpointError) else f"params.json is damaged: {error}"
            )
            self.missing.append(cause)
            return []
        return rows

    def differences(self) -> tuple[str, list[tuple[str, str, str]]]:
        """Return what the config differs in, and from what; see `config.defaults.differences`."""
        try:
            config = read_saved_config(self.directory)
        except CheckpointError as error:
            if "is missing" not in str(error):  # else it is listed already
                self.missing.append(error.problems[0].cause)
            return "", []
        return differences(config, read_choices(self.directory))


def finite_history(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the metrics of each epoch without integers that a float cannot hold."""
    return [{name: value for name, value in row.items() if not _is_huge(value)} for row in rows if row["epoch"] < 2**53]


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > sys.float_info.max


def _is_param(row: Any) -> bool:
    """Return whether a row of `params.json` has the entries that are shown."""
    kinds = {"name": str, "aliases": list, "shape": list, "count": int, "options": dict, "decided_by": dict}
    named = ("group", "optimizer")
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(row.get(key, 0), str | None) for key in named)
        and all(isinstance(word, str) for word in row["aliases"])
        and row["options"].keys() <= row["decided_by"].keys()
    )

"""The report of a sweep: `report.html` and `curves.png` in its directory. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from trainkit.core.errors import CheckpointError
from trainkit.core.paths import display_path
from trainkit.core.redaction import environment_secrets, redact_command_line
from trainkit.display.sweep_report import JobFacts, SweepFacts, sweep_page
from trainkit.engine.report import finite_history, write_files
from trainkit.runs.untrusted import read_end
from trainkit.sweeps.axes import MISSING
from trainkit.sweeps.collect import Collection, RunRecord, collect
from trainkit.sweeps.comparison import compare
from trainkit.sweeps.search.facts import search_facts
from trainkit.sweeps.table_text import cells, short_text, value_text

MAX_OUTPUT_LINES, MAX_OUTPUT_BYTES = 40, 2**16  # of a failed job
# What a terminal obeys: colours and movements of the cursor.
TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")


def write_sweep_report(directory: Path) -> Path:
    """Write the report of a sweep, or of the runs in a folder, into its directory; return the path of `report.html`.

    Damaged and missing files are named in the report.

    Raises:
        ConfigError: the directory does not hold a run.
        StorageError: the directory cannot be written.
    """
    facts = sweep_facts(directory.absolute())
    return write_files(directory, sweep_page(facts), facts.charts)


def sweep_facts(directory: Path) -> SweepFacts:
    """Return what the files of a sweep say.

    Raises:
        ConfigError: the directory does not hold a run.
    """
    collection = collect([directory])
    table = compare(collection)
    is_folded = any(row.count > 1 for row in table.rows)
    runs = sorted(collection.runs, key=lambda run: _rank(run, table.metric or "", table.mode))
    seeds = len({str(run.seed) for run in runs if run.config}) > 1
    jobs = [_job(directory, run, collection, with_seed=seeds) for run in runs]
    return SweepFacts(
        name=display_path(directory.resolve()),
        jobs=jobs,
        metric=table.metric or "",
        folded=cells(table, directories=False) if is_folded else ((), ()),
        notes=table.notes,
        missing=[f"{job.name}: {job.why}" for job in jobs if job.status == "unreadable"],
        searches=[search_facts(search, with_name=len(table.searches) > 1) for search in table.searches],
    )


def _rank(run: RunRecord, metric: str, mode: str) -> tuple[bool, float]:
    """Return a key that sorts the best run first, and runs without a finite value last."""
    value = run.metrics.get(metric, math.nan)
    return (not math.isfinite(value), (-value if mode == "max" else value) if math.isfinite(value) else 0)


def _job(directory: Path, run: RunRecord, collection: Collection, *, with_seed: bool) -> JobFacts:
    """Return what the files of a run say.

    Args:
        directory: of the sweep.
        run: a job, or another run.
        collection: the runs, which have the axes.
        with_seed: show the seed, which is not an axis.
    """
    given = dict(_key_and_value(text) for text in run.overrides)
    names = [(axis.name, axis.key) for axis in collection.axes] + [("seed", "seed")] * with_seed
    if run.config:
        axes = {axis.name: axis.value(run) for axis in collection.axes} | {"seed": run.seed}
    else:  # its config is missing or damaged
        axes = {name: given.get(key, MISSING) for name, key in names}
    path = os.path.relpath(run.directory, directory.resolve())
    history = finite_history(run.history)
    times = [row["seconds"] for row in history if isinstance(row.get("seconds"), float)]
    job = run.job
    trial = job.trial if job else None
    shown = value_text if trial is None else short_text
    seconds = job.seconds if job and job.seconds is not None else sum(times) if times else None
    return JobFacts(
        name=path if job is None else str(job.number),
        axes={name: shown(axes[name]) for name, _ in names if axes[name] is not MISSING},
        status=run.status,
        best=run.metrics,
        seconds=seconds,
        history=history,
        link=f"./{quote(path)}/" if run.directory.is_dir() else "",
        why=run.why,
        exit_code=job.exit_code if job else run.info.get("exit_code"),
        attempts=job.attempts if job else 0,
        tail=list(_end_of_output(run.directory)) if run.status in ("failed", "stopped", "unreadable") else (),
        trial=trial,
        epochs=None if trial is None else run.epochs,
    )


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _end_of_output(directory: Path) -> Iterator[str]:
    """Yield the last lines that a job printed, without secrets of the environment."""
    text = ""
    for name in ("output.log", "trainkit.log"):
        try:
            text = read_end(directory / name, MAX_OUTPUT_BYTES)
        except (FileNotFoundError, CheckpointError):
            continue
        if text.strip():
            break
    secrets = set(environment_secrets())
    lines = [TERMINAL_CODES.sub("", line).rstrip().rpartition("\r")[2] for line in text.split("\n")]
    for line in [line for line in lines if line][-MAX_OUTPUT_LINES:]:
        yield str(redact_command_line(line, secrets))

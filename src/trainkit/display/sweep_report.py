"""The report of a sweep as an HTML page, from plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.display.charts import NOT_METRICS, Chart, job_charts, metric_names
from trainkit.display.page import (
    Cell,
    Content,
    Html,
    details,
    element,
    join,
    listing,
    page,
    section,
    table,
    text,
    tiles,
    verbatim,
)
from trainkit.display.report_parts import (
    MAX_ROWS,
    chart_section,
    first_rows,
    footer,
    metric_cell,
    missing_lines,
    swatch,
)
from trainkit.display.search_report import SearchFacts, search_sections
from trainkit.display.text import SHOWN_METRICS, count, duration, number

NOT_FAILED = ("completed", "running", "queued", "pruned", "paused")


@dataclass(frozen=True)
class JobFacts:
    """What the files of a sweep say about a job.

    Attributes:
        name: the name of the job: its number, or its directory in the sweep.
        axes: the swept keys and their values.
        status: the status of the job.
        best: the metrics of its best epoch.
        seconds: its wall time.
        history: the metrics of each epoch.
        link: the address of its directory, relative to the sweep.
        why: the cause of a failure or a stop.
        exit_code: the exit code of the last attempt.
        attempts: how often the job was started.
        tail: the last lines of its output.
        trial: the trial of a search that it belongs to.
        epochs: that have ended, in a search.
    """

    name: str
    axes: Mapping[str, str]
    status: str
    best: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    history: Sequence[Mapping[str, Any]] = ()
    link: str = ""
    why: str = ""
    exit_code: int | None = None
    attempts: int = 0
    tail: Sequence[str] = ()
    trial: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class SweepFacts:
    """What the files of a sweep say.

    Attributes:
        name: the name of the sweep: its directory.
        jobs: the best first.
        metric: the monitored metric.
        folded: header and rows of the comparison, if it folds seeds.
        notes: what a reader should know about the comparison.
        missing: what is missing or damaged.
        searches: that the jobs belong to.
    """

    name: str
    jobs: Sequence[JobFacts] = ()
    metric: str = ""
    folded: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()
    searches: Sequence[SearchFacts] = ()

    @property
    def charts(self) -> list[Chart]:
        """The charts of the sweep."""
        found = {name for job in self.jobs for name in metric_names(job.history)}
        names = [name for name in dict.fromkeys([self.metric, *SHOWN_METRICS]) if name in found]
        return job_charts([(job_label(job), job.history) for job in self.jobs], names)


def job_label(job: JobFacts) -> str:
    """Return the name of a job with its swept values."""
    return " ".join([job.name, *(f"{key}={value}" for key, value in job.axes.items())])


def sweep_page(facts: SweepFacts) -> str:
    """Return the report of a sweep."""
    failed = [job for job in facts.jobs if job.status not in NOT_FAILED]
    parts = [
        element("h1", facts.name),
        missing_lines(facts.missing),
        tiles(_sweep_numbers(facts)),
        *(search_sections(search, place) for place, search in enumerate(facts.searches)),
        section(
            "Comparison",
            table("Mean and standard deviation over the seeds, the best first", *facts.folded, sortable=True),
            _jobs(facts),
            listing(facts.notes, "lines"),
        ),
        section("Learning curves", chart_section(facts.charts, shared_legend=True)),
        section("Failures", *(_failure(job) for job in failed)),
        footer(),
    ]
    return page(f"{facts.name} · trainkit", parts)


def _sweep_numbers(facts: SweepFacts) -> dict[str, tuple[str, str]]:
    """Return the headline numbers of a sweep."""
    search = facts.searches[0] if len(facts.searches) == 1 and facts.searches[0].trials else None
    statuses = [job.status for job in facts.jobs] if search is None else [trial.status for trial in search.trials]
    others = [f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses) if name != "completed"]
    what = "jobs" if search is None else "trials"
    numbers = {f"{what} completed": (f"{statuses.count('completed')} of {len(statuses)}", ", ".join(others))}
    best = facts.jobs[0] if facts.jobs else None
    if search is not None and search.trials[0].value is not None:
        numbers[f"best {search.metric}"] = (number(search.trials[0].value), search.trials[0].setting)
    elif best is not None and facts.metric in best.best:
        numbers[f"best {facts.metric}"] = (number(best.best[facts.metric]), f"job {job_label(best)}")
    if search is not None and search.saved is not None:
        numbers["epochs saved by pruning"] = search.saved
    seconds = [job.seconds for job in facts.jobs if job.seconds is not None]
    if seconds:
        numbers["time of all jobs"] = (duration(sum(seconds)), f"{duration(sum(seconds) / len(seconds))} on average")
    return numbers


def _jobs(facts: SweepFacts) -> Html:
    """Return the table of the jobs. The swatch of a job is that of its curves."""
    axes = list(dict.fromkeys(key for job in facts.jobs for key in job.axes))
    found = list(dict.fromkeys(name for job in facts.jobs for name in job.best))
    found = [name for name in found if name not in NOT_METRICS or name == facts.metric]
    metrics = [name for name in dict.fromkeys([facts.metric, *SHOWN_METRICS, *found]) if name in found]
    is_search = any(job.trial is not None for job in facts.jobs)
    rows: list[list[Content]] = []
    for index, job in enumerate(facts.jobs[:MAX_ROWS]):
        name = element("a", job.name, href=job.link).text if job.link else text(job.name)
        first = Cell(
            Html((swatch(index) if job.history else "") + name), float(job.name) if job.name.isdecimal() else None
        )
        values = [Cell(job.axes.get(axis, ""), _as_number(job.axes.get(axis, ""))) for axis in axes]
        status = element("span", job.status, class_=job.status if job.status.isalpha() else "failed")
        time = "" if job.seconds is None else Cell(duration(job.seconds), job.seconds)
        shown = ["" if value is None else Cell(str(value), float(value)) for value in (job.trial, job.epochs)]
        more = shown if is_search else []
        rows.append([first, *values, *(metric_cell(job.best.get(name)) for name in metrics), *more, time, status])
    caption = f"The jobs, the best first by {facts.metric or 'status'}{first_rows(len(facts.jobs))}"
    more_columns = ["trial", "epochs"] if is_search else []
    return table(caption, ["job", *axes, *metrics, *more_columns, "time", "status"], rows, sortable=True)


def _failure(job: JobFacts) -> Html:
    code = "" if job.exit_code is None else f"exit code {job.exit_code}"
    tries = count(job.attempts, "attempt") if job.attempts > 1 else ""
    facts = ", ".join(part for part in (job.status, code, tries) if part)
    cause = job.why or "the cause is not recorded"
    heading = element("h3", f"job {job_label(job)}")
    tail = details("The end of its output", verbatim("\n".join(job.tail), f"output of job {job.name}"), is_open=True)
    return join([heading, element("p", f"{facts}: {cause}"), tail])


def _as_number(value: str) -> float | None:
    try:
        return None if math.isnan(found := float(value)) else found
    except ValueError:
        return None

"""What a user sees while a sweep runs: a live table on a terminal, otherwise a line for each event."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainkit.core.terminal import printable
from trainkit.display.text import count, duration, number, sparkline

if TYPE_CHECKING:
    from rich.table import Table


MAX_CAUSE = 100  # characters; the log of the job has the whole cause


@dataclass(frozen=True)
class JobView:
    """A running job as the table shows it.

    Attributes:
        number: the number of the job.
        name: its overrides, without those that all jobs share.
        done: epochs, or steps if the training is planned in steps, at the end of the last epoch.
        planned: epochs or steps of the whole training; None: only `max_minutes` ends it.
        values: the monitored value of each epoch.
        elapsed: seconds since the start.
        trained: seconds of the epochs that have ended.
        metric: the monitored one.
    """

    number: int
    name: str
    planned: int | None
    done: int = 0
    values: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    trained: float = 0.0
    metric: str = ""

    @property
    def seconds_left(self) -> float | None:
        """The time that the rest takes, at the mean speed so far."""
        if not self.done or self.planned is None:
            return None
        return self.trained / self.done * (self.planned - self.done)


class SilentJobs:
    """Shows nothing; the base of the others."""

    wants_views = False  # whether `update` uses its arguments

    def __enter__(self) -> SilentJobs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def print_line(self, line: str) -> None:
        """Show an event: a job has started or ended."""

    def update(self, running: list[JobView], counts: dict[str, int]) -> None:
        """Show how far the running jobs are, and how many jobs have which status."""

    def close(self) -> None:
        """Stop showing."""


class JobLines(SilentJobs):
    """Prints a line for each event to stderr."""

    def print_line(self, line: str) -> None:
        """Print an event."""
        print(printable(line), file=sys.stderr, flush=True)


class JobTable(SilentJobs):
    """A live table of the running jobs; events are lines above it."""

    wants_views = True

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.running: list[JobView] = []
        self.counts: dict[str, int] = {}
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, get_renderable=self.render, auto_refresh=False, transient=True)
        self.live.start()

    def print_line(self, line: str) -> None:
        """Print an event above the table."""
        self.console.print(printable(line), markup=False, soft_wrap=True, highlight=False)

    def update(self, running: list[JobView], counts: dict[str, int]) -> None:
        """Refresh the table."""
        self.running, self.counts = running, counts
        self.live.refresh()

    def render(self) -> Table:
        """Return the table."""
        from rich.table import Table
        from rich.text import Text

        sizes = [f"{size} {status}" for status, size in self.counts.items() if size]
        title = f"{count(sum(self.counts.values()), 'job')}: {', '.join(sizes)}"
        metric = self.running[0].metric if self.running else ""
        names = ("job", "epoch", metric, "time", "time left", "curve", "overrides")
        table = Table(*names, title=title, title_justify="left", box=None)
        for view in self.running:
            table.add_row(*(Text(printable(cell)) for cell in self._cells(view)))
        return table

    @staticmethod
    def _cells(view: JobView) -> list[str]:
        left = "" if view.seconds_left is None else duration(view.seconds_left)
        value = number(view.values[-1]) if view.values else ""
        done = str(view.done) if view.planned is None else f"{view.done}/{view.planned}"
        return [str(view.number), done, value, duration(view.elapsed), left, sparkline(view.values, 20), view.name]

    def close(self) -> None:
        """Remove the table; printed lines stay."""
        self.live.stop()


def start_line(job: int, name: str, attempt: int) -> str:
    """Return the line that says that a job starts."""
    again = f" (attempt {attempt})" if attempt > 1 else ""
    return f"job {job} started{again}: {name}" if name else f"job {job} started{again}"


def end_line(job: int, name: str, outcome: dict[str, Any], seconds: float, log: str) -> str:
    """Return the line that says how a job ended.

    Args:
        job: the number of the job.
        name: its overrides.
        outcome: its status, cause, and best monitored value.
        seconds: how long it took.
        log: the path of its output.
    """
    line = f"job {job} {outcome['status']}"
    if outcome["status"] in ("completed", "paused", "pruned"):
        value = outcome["value"]
        best = f": {outcome['metric']} {number(value)}" if isinstance(value, int | float) else ""
        return f"{line} in {duration(seconds)}{best}  {name}".rstrip()
    cause = f": {short_cause(outcome['why'])}" if outcome["why"] else ""
    return f"{line} after {duration(seconds)}{cause}; log: {log}"


def short_cause(why: str | None) -> str:
    """Return the first line of a cause, cut to `MAX_CAUSE` characters."""
    line = (why or "").partition("\n")[0]
    return line if len(line) <= MAX_CAUSE else f"{line[: MAX_CAUSE - 1]}…"


def make_job_display(progress: str) -> SilentJobs:
    """Return the display for the config key `progress`: auto, rich, tqdm, plain or off."""
    if progress == "off" or sys.stderr is None:
        return SilentJobs()
    return JobTable() if progress == "rich" or (progress == "auto" and sys.stderr.isatty()) else JobLines()

"""Check a training: the errors of its config and parts, its path with one batch, and estimates for the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainkit.config.repair import Repaired
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, Problem, TrainkitError
from trainkit.core.machine import number_of_processes
from trainkit.core.memory import format_bytes
from trainkit.diagnostics.check.estimates import Estimates, estimate, seconds_of_process
from trainkit.diagnostics.check.measure import Pace
from trainkit.diagnostics.check.parts import CORE, build_parts, keys_of, remove_parts
from trainkit.diagnostics.check.path import NEEDED, PHASES, PathResult, run_path
from trainkit.diagnostics.check.scaling import Scaling, estimate_scaling


@dataclass
class Report:
    """What a check found.

    Attributes:
        errors: every error, those of the config first.
        phases: phase -> `ok`, `off`, `not reached`, or the causes of its errors.
        estimates: for the run; None: the path failed, or the config has errors.
        scaling: estimates for several devices; None: see `estimates`.
        notes: for the user.
    """

    errors: list[TrainkitError] = field(default_factory=list)
    phases: dict[str, str] = field(default_factory=dict)
    estimates: Estimates | None = None
    scaling: Scaling | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """Every problem once."""
        return list(dict.fromkeys(problem for error in self.errors for problem in error.problems))

    def error(self) -> TrainkitError | None:
        """Return an error with all problems, and the exit code of the first; None if there is no problem."""
        if not self.errors:
            return None
        joined = TrainkitError(*self.problems)
        joined.exit_code = self.errors[0].exit_code
        return joined

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain containers."""
        problems = [{"cause": problem.cause, "hint": problem.hint} for problem in self.problems]
        estimates = None if self.estimates is None else self.estimates.as_dict()
        return {
            "ok": not problems,
            "errors": problems,
            "phases": self.phases,
            "estimates": estimates,
            "scaling": None if self.scaling is None else self.scaling.as_dict(),
            "notes": self.notes,
        }


def check(repaired: Repaired, seconds: float, on_note: Callable[[str], None] = lambda _: None) -> Report:
    """Find all errors of a training, and estimate the time and the memory of the run.

    Args:
        repaired: the config, in which wrong values are replaced.
        seconds: of the measured epochs.
        on_note: is called with a line before each part that takes a while.
    """
    report = Report()
    if repaired.problems:
        report.errors.append(ConfigError(*repaired.problems))
    report.phases = dict.fromkeys(PHASES, "not reached")
    if repaired.composed is None:
        return report
    report.errors += _wrong_devices(repaired.composed.settings)
    on_note("building each part of the training")
    built, errors = build_parts(repaired.composed.settings, repaired.broken)
    built_after = seconds_of_process()
    report.errors += errors
    keys = [key for error in errors for key in keys_of(error)]
    settings = None if repaired.broken & CORE else remove_parts(repaired.composed.settings, keys)
    if settings is None:
        return report
    settings, session = built or (settings, None)
    on_note("training one batch through the whole path, and measuring some epochs")
    # Values that were replaced may have another cost, so an estimate would be wrong.
    pace = Pace(0.0 if report.errors else seconds)
    result = run_path(settings, session, pace)
    del session
    for phase in PHASES:
        failed = result.errors.get(phase, [])
        report.errors += failed
        causes = "; ".join(error.problems[0].cause.partition("\n")[0] for error in failed)
        report.phases[phase] = f"error: {causes}" if failed else _status(phase, settings, result)
    if result.measured is not None and result.settings is not None and not report.errors and pace.seconds:
        measured = result.measured
        startup = built_after + measured.started - measured.prepared
        report.estimates = estimate(result.settings, measured, startup)
        chosen = result.settings
        report.scaling = estimate_scaling(measured.costs, chosen.batch_size, chosen.micro_batch, chosen.distributed)
        report.notes += [*report.estimates.notes, *_disk_note(report.estimates)]
    return report


def _wrong_devices(settings: Settings) -> list[TrainkitError]:
    """Return an error if this machine has fewer GPUs than `devices`. The check itself uses one process."""
    try:
        number_of_processes(settings.devices, settings.device)
    except ConfigError as error:
        return [error]
    return []


def _status(phase: str, settings: Settings, result: PathResult) -> str:
    """Return the status of a phase without errors."""
    if phase in result.reached:
        return "ok"
    trained = not any(name in result.errors for name in NEEDED)
    is_off = settings.checkpoint is None if phase in ("checkpoint", "resume") else phase == "validation"
    return "off" if trained and is_off else "not reached"


def _disk_note(estimates: Estimates) -> list[str]:
    """Return a note if the checkpoints do not fit on the disk of the working directory."""
    free = shutil.disk_usage(Path.cwd()).free
    if estimates.checkpoints <= free:
        return []
    return [
        f"note: the checkpoints need {format_bytes(estimates.checkpoints)}, and the disk has {format_bytes(free)} free"
    ]


def add_problems(repaired: Repaired, problems: Sequence[Problem]) -> Repaired:
    """Return the config of the first job of a sweep with the problems of all jobs."""
    return replace(repaired, problems=list(dict.fromkeys([*problems, *repaired.problems])))

"""Resume a sweep: keep completed jobs, continue stopped ones, start failed ones again."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainkit.config.compose import compose_run, compose_sweep
from trainkit.config.jobs import typed_hydra
from trainkit.core.errors import CheckpointError, ConfigError, Problem
from trainkit.core.paths import display_path
from trainkit.core.redaction import REDACTED, is_secret
from trainkit.core.spelling import did_you_mean
from trainkit.core.terminal import printable
from trainkit.runs.fingerprint import is_allowed
from trainkit.sweeps.grid import LAUNCHER, sweep
from trainkit.sweeps.ledger import JobRecord, Ledger, read_ledger, shared_overrides
from trainkit.sweeps.lifecycle import finish_sweep, open_sweep
from trainkit.sweeps.local import LocalOptions, run_on_this_machine
from trainkit.sweeps.pool import Task, start_server_for
from trainkit.sweeps.recording import record_missing_ends
from trainkit.sweeps.resources import devices_of, measure_capacity
from trainkit.sweeps.saved_jobs import may_change, saved_config

SWEEP_KEYS = ("hydra.launcher.", "fail_fast=", "retries=", "progress=", "device=", "report=")


def resume_sweep(directory: Path, overrides: Sequence[str] = ()) -> int:
    """Run the jobs of a sweep that are not completed, and print the comparison.

    Args:
        directory: of the sweep.
        overrides: of keys that do not change results, such as `device`; `hydra.launcher.n_jobs`, `fail_fast` and
            `retries` apply to the sweep.

    Returns:
        The exit code: 10 if a job failed, else 0.

    Raises:
        ConfigError: an override is wrong, or the config of a job.
        CheckpointError: a file of a job is damaged.
        RunDirectoryInUseError: another process runs this sweep.
        Stopped: a signal stopped the jobs, which have saved.
    """
    _check_overrides(overrides)
    search = Ledger(directory).search()
    if search is not None:
        return _resume_search(directory, search, overrides)
    for_sweep = [text for text in overrides if text.startswith(SWEEP_KEYS)]
    for_jobs = [text for text in overrides if not text.startswith(("hydra.", "fail_fast=", "retries=", "report="))]
    options, report = _sweep_options(for_sweep)
    if not read_ledger(directory):
        raise ConfigError(f"{directory}: the sweep was stopped before its first job", hint="repeat its command")
    started = time.monotonic()
    with open_sweep(directory, overrides, []) as ledger:
        jobs = [job for job in record_missing_ends(ledger) if job.status != "completed"]
        tasks = _tasks(ledger, jobs, for_jobs)
        measure_capacity(options.launcher.n_jobs, options.launcher.jobs_per_gpu, 1, "cpu")  # refuse wrong values
        if tasks:
            devices = max(devices_of(task.config) for task in tasks)
            run_on_this_machine(iter(tasks), len(tasks), replace(options, devices=devices), ledger)
    code = finish_sweep(ledger, {job.number for job in ledger.read()}, report, started)
    unqueued = ledger.find_unqueued()
    if unqueued is not None:
        command = shlex.join(["trainkit", "-m", *unqueued, f"hydra.sweep.dir={display_path(directory)}"])
        note = f"note: the sweep was stopped before all its jobs were queued; to run them: {command}"
        print(printable(note), file=sys.stderr)
    return code


def _check_overrides(overrides: Sequence[str]) -> None:
    problems = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or key.startswith(("+", "~")):
            problems.append(Problem(f"{text}: not of the form KEY=VALUE", "write KEY=VALUE"))
        elif key.startswith("hydra.") and not key.startswith("hydra.launcher."):
            problems.append(Problem(f"{text}: a resumed sweep keeps this key", "remove it"))
        elif is_secret(key.rpartition(".")[2]) or is_allowed(
            key, {"search"}
        ):  # a saved config does not contain it, so it is given again
            continue
        elif not (key.startswith("hydra.") or may_change(key)):
            hint = "add values with the command that started the sweep and hydra.sweep.dir=DIR, or resume a single job"
            problems.append(Problem(f"{text}: the jobs of a sweep keep their {key}", hint))
    if problems:
        raise ConfigError(*problems)


def _resume_search(directory: Path, search: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Continue a search as its command does, with overrides for the rest.

    Raises:
        ConfigError: the saved command lacks its secrets, or is wrong.
    """
    command = [str(text) for text in search["overrides"]]
    if any(REDACTED in text for text in command):
        hint = f"repeat its command with hydra.sweep.dir={display_path(directory)}"
        raise ConfigError("the command of the search contains a secret, which is not saved", hint=hint)
    given = [*command, *overrides, f"hydra.sweep.dir={directory}"]
    config_dir = None if search.get("config_dir") is None else str(search["config_dir"])
    return sweep(compose_sweep(given, config_dir, on_first_job=start_server_for), given, config_dir)


def _sweep_options(overrides: Sequence[str]) -> tuple[LocalOptions, Any]:
    """Return the options that apply to the sweep, and the key `report`.

    Raises:
        ConfigError: an override is wrong.
    """
    composed = compose_run(overrides)
    assert composed.hydra is not None
    known = ("n_jobs", "jobs_per_gpu")
    launcher = composed.hydra.launcher
    wrong = [key for key in launcher if key not in (*known, "_target_")]
    if wrong or launcher._target_ != LAUNCHER:
        hint = did_you_mean(str(wrong[0]), known) if wrong else "repeat the sweep's command to use another launcher"
        raise ConfigError(
            f"hydra.launcher: resume runs the jobs on this machine, with {' and '.join(known)}", hint=hint
        )
    settings = composed.settings
    options = LocalOptions(
        launcher, settings.device, 1, settings.progress, settings.retries, fail_fast=settings.fail_fast is True
    )
    return options, settings.report


def _tasks(ledger: Ledger, jobs: Sequence[JobRecord], overrides: Sequence[str]) -> list[Task]:
    """Return a task for each job, with its saved config. A job with a damaged file is recorded as failed.

    Raises:
        ConfigError: everything that is wrong with the configs.
        CheckpointError: all jobs have a damaged file.
    """
    problems: list[Problem] = []
    damaged: dict[int, CheckpointError] = {}
    tasks = []
    typed = typed_hydra()
    shared = shared_overrides(jobs)
    for job in jobs:
        try:
            config = saved_config(ledger.directory, job, overrides, typed)
        except CheckpointError as error:
            damaged[job.number] = error
            continue
        except ConfigError as error:
            problems += [replace(p, cause=f"job {job.number}: {p.cause}") for p in error.problems]
            continue
        name = " ".join(text for text in job.overrides if text not in shared)
        tasks.append(Task(job.number, name, job.directory, config, job.threads))
    if problems:
        raise ConfigError(*problems)
    if damaged and not tasks:
        raise next(iter(damaged.values()))
    for number, damage in damaged.items():
        print(f"job {number} cannot be resumed:\n{damage}", file=sys.stderr)
        outcome = {"status": "failed", "exit_code": damage.exit_code, "why": damage.problems[0].cause}
        ledger.append({"event": "ended", "job": number, **outcome, "seconds": 0.0})
    return tasks

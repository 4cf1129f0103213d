"""A sweep over values: Hydra expands the values, trainkit's launcher runs the jobs, and a table compares them."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from trainkit.config.compose import Sweep
from trainkit.config.jobs import find_problems_of_jobs, task_overrides, use_launcher
from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.config.search_path import search_path
from trainkit.core.errors import ConfigError, Stopped
from trainkit.core.paths import claim_directory, display_path, storage_error, update_latest_link
from trainkit.core.redaction import redact_command_line
from trainkit.core.terminal import printable, printable_lines
from trainkit.display.text import count
from trainkit.engine.report import is_cheap, write_or_note
from trainkit.runs.lock import Lock
from trainkit.runs.secrets import secrets_of
from trainkit.sweeps.comparison import comparison_lines
from trainkit.sweeps.ledger import Ledger, is_sweep
from trainkit.sweeps.pool import call_in_server
from trainkit.sweeps.recording import failure_lines, redact_file
from trainkit.sweeps.report import write_sweep_report

LAUNCHER = "hydra_plugins.trainkit_launcher.TrainkitLauncher"


def sweep(checked: Sweep, overrides: Sequence[str], config_dir: str | None = None) -> int:
    """Train each combination of values in a separate process, and print a comparison, best first.

    In the directory of an earlier sweep, only the jobs that are not completed run.

    Args:
        checked: from `compose_sweep`.
        overrides: the overrides of the command line, with the values to sweep over.
        config_dir: a folder of configs besides ./conf.

    Returns:
        The exit code: 10 if a job failed, else 0.

    Raises:
        ConfigError: everything that is wrong with the `_target_`s, or the sweep cannot start.
        RunDirectoryInUseError: another process runs this sweep.
        Stopped: a signal stopped the jobs, which have saved.
    """
    configs = [job.settings.source for job in checked.jobs]
    problems = call_in_server(find_problems_of_jobs, configs)
    if problems:
        raise ConfigError(*problems)
    if checked.more_jobs:
        print(f"note: only the first {len(checked.jobs)} jobs were checked beforehand", file=sys.stderr)
    directory = checked.directory
    if not (checked.directory_given and is_sweep(directory)):
        directory = claim_directory(directory, exact=checked.directory_given)
    if not checked.directory_given:
        update_latest_link(directory, Path("outputs"))
    started = time.monotonic()
    print(printable(f"sweep directory: {display_path(directory)}"), file=sys.stderr)
    with recorded(directory, overrides, configs) as ledger:
        _launch(checked, overrides, config_dir, ledger)
    return finish_sweep(ledger, ledger.last_command().jobs, checked.jobs[0].settings.report, started)


def _launch(checked: Sweep, overrides: Sequence[str], config_dir: str | None, ledger: Ledger) -> None:
    """Let Hydra's sweeper and the launcher run the jobs."""
    from trainkit.sweeps.job_function import job_function

    given = [text for text in mark_new_arguments(overrides) if not text.lstrip("+").startswith("hydra.sweep.dir=")]
    own = [f"hydra.sweep.dir='{ledger.directory}'", "hydra.output_subdir=null"]  # Hydra's copies contain secrets
    app = Hydra.create_main_hydra2("trainkit", search_path(config_dir))
    app.config_loader = checked.loader
    try:
        config = app.compose_config(
            config_name="config", overrides=[*given, *own], run_mode=RunMode.MULTIRUN, with_log_configuration=False
        )
        _use_own_launcher(config)
        callbacks = Callbacks(config)
        callbacks.on_multirun_start(config=config, config_name="config")
        sweeper: Any = Plugins.instance().instantiate_sweeper(
            config=config,
            hydra_context=HydraContext(config_loader=checked.loader, callbacks=callbacks),
            task_function=partial(job_function, config_dir=config_dir),
        )
        sweeper.validate_batch_is_legal = lambda _: None  # `compose_sweep` has checked the jobs
        sweeper.sweep(arguments=task_overrides(config))
        callbacks.on_multirun_end(config=config, config_name="config")
    except (HydraException, RuntimeError) as error:
        raise ConfigError(f"the sweep cannot start: {error}", hint="check hydra/sweeper and hydra/launcher") from error
    finally:
        redact_file(ledger.directory / "multirun.yaml", secrets_of(checked.jobs[0].settings.source))


def _use_own_launcher(config: DictConfig) -> None:
    """Let trainkit's launcher record the jobs, also if another launcher runs them."""
    if config.hydra.launcher._target_ == LAUNCHER:
        return
    if config.retries or config.fail_fast:
        raise ConfigError("fail_fast and retries need trainkit's launcher", hint="remove hydra/launcher=…")
    use_launcher(config, LAUNCHER)


@contextmanager
def recorded(directory: Path, overrides: Sequence[str], configs: Sequence[DictConfig]) -> Iterator[Ledger]:
    """Lock the directory of a sweep and open its ledger; write the summary at the end.

    Args:
        directory: of the sweep.
        overrides: of the command line.
        configs: of some jobs; their secrets are removed from what is recorded.

    Raises:
        RunDirectoryInUseError: another process runs this sweep.
        Stopped: the block raised it; the message names the command that continues.
    """
    lock, ledger = Lock(directory), Ledger(directory)
    try:
        lock.acquire()
    except OSError as error:
        raise storage_error(directory, error) from error
    try:
        secrets = secrets_of(configs[0]) if configs else set()
        command, given = (redact_command_line(list(words), secrets) for words in (sys.argv, overrides))
        ledger.append({"event": "sweep", "version": 1, "command": command, "overrides": given})
        yield ledger
    except Stopped as stopped:
        ledger.write_summary("stopped", stopped.exit_code)
        sizes = Counter(job.status.replace("queued", "not started") for job in ledger.read())
        shown = ", ".join(f"{size} {status}" for status, size in sizes.items())
        stopped.summary = f"jobs: {shown}; {resume_command(ledger)}"
        raise
    except BaseException as error:
        ledger.write_summary("failed", getattr(error, "exit_code", 1))
        raise
    finally:
        lock.release()


def finish_sweep(ledger: Ledger, numbers: set[int], report: Any, started: float) -> int:
    """Write the summary and the report of a sweep, print the comparison and the failures; return the exit code.

    Args:
        ledger: of the sweep.
        numbers: of the jobs that the command asked for. They decide the exit code.
        report: the config key.
        started: when the jobs began, from `time.monotonic`.
    """
    jobs = ledger.read()
    asked = [job for job in jobs if job.number in numbers]
    code = 10 if any(job.status != "completed" for job in asked) else 0
    ledger.write_summary("failed" if code else "completed", code)
    skipped = len(numbers - ledger.last_command().started)
    if skipped and not code:
        print(f"{count(skipped, 'job')} had been completed before", file=sys.stderr)
    print(printable_lines(comparison_lines(ledger.directory)))
    page = ledger.directory / "report.html"
    if report is not None and (report != "auto" or page.exists() or is_cheap(time.monotonic() - started)):
        written = write_or_note(lambda: write_sweep_report(ledger.directory))
        print(printable_lines([f"report: {display_path(written)}"] if written is not None else []))
    lines = failure_lines(asked)
    others = sum(job.status != "completed" for job in jobs if job.number not in numbers)
    if others:
        lines.append(f"note: {count(others, 'other job')} of this sweep did not complete; {resume_command(ledger)}")
    for line in lines:
        print(printable_lines([line]), file=sys.stderr)
    return code


def resume_command(ledger: Ledger) -> str:
    """Return how to continue a sweep."""
    return f"to continue: trainkit resume {shlex.quote(display_path(ledger.directory))}"

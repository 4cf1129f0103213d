"""A sweep over values: Hydra expands the values, trainkit's launcher runs the jobs, and a table compares them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
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
from trainkit.config.jobs import find_problems_of_jobs, task_overrides, use_launcher, use_sweeper
from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.config.search_path import search_path
from trainkit.core.errors import ConfigError
from trainkit.core.paths import claim_directory, display_path, update_latest_link
from trainkit.core.terminal import printable
from trainkit.runs.secrets import secrets_of
from trainkit.sweeps.ledger import Ledger, is_sweep, read_ledger
from trainkit.sweeps.lifecycle import finish_sweep, open_sweep
from trainkit.sweeps.pool import call_in_server
from trainkit.sweeps.secret_files import redact_yaml

LAUNCHER = "hydra_plugins.trainkit_launcher.TrainkitLauncher"
SWEEPER = "hydra_plugins.trainkit_sweeper.TrainkitSweeper"


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
    is_search = checked.space is not None
    check_kind(directory, is_search=is_search)
    with open_sweep(directory, overrides, configs, shared=is_search) as ledger:
        _launch(checked, overrides, config_dir, ledger)
    jobs = ledger.last_command().jobs
    if is_search:  # jobs that still run belong to other processes
        jobs = {job.number for job in ledger.read() if job.status not in ("queued", "running")}
    return finish_sweep(ledger, jobs, checked.jobs[0].settings.report, started)


def check_kind(directory: Path, *, is_search: bool) -> None:
    """Raise `ConfigError` if the directory holds a sweep over listed values and this is a search, or the reverse."""
    found = {job.trial is not None for job in read_ledger(directory)}
    if found and found != {is_search}:
        kind, other = ("a search", "a sweep over listed values")[:: 1 if found == {True} else -1]
        raise ConfigError(
            f"{display_path(directory)} holds {kind}, and this is {other}", hint="choose another hydra.sweep.dir"
        )


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
        if checked.space is None:
            _wrap_launcher(config)
        else:
            _use_search(config, config_dir)
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
        redact_yaml(ledger.directory / "multirun.yaml", secrets_of(checked.jobs[0].settings.source))


def _use_search(config: DictConfig, config_dir: str | None) -> None:
    """Put trainkit's sweeper for searches before Hydra's basic one.

    Raises:
        ConfigError: the launcher is not trainkit's.
    """
    if config.hydra.launcher._target_ != LAUNCHER:
        hint = (
            "remove hydra/launcher=…; to use several machines, run this command on each, with the same hydra.sweep.dir"
        )
        raise ConfigError("a search needs trainkit's launcher, which can stop jobs", hint=hint)
    use_sweeper(config, SWEEPER, config_dir=config_dir)


def _wrap_launcher(config: DictConfig) -> None:
    """Put trainkit's launcher, which records the jobs, before another launcher."""
    if config.hydra.launcher._target_ == LAUNCHER:
        return
    if config.retries or config.fail_fast:
        raise ConfigError("fail_fast and retries need trainkit's launcher", hint="remove hydra/launcher=…")
    use_launcher(config, LAUNCHER)

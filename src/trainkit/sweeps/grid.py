"""A sweep over values: Hydra launches its jobs, and a table compares them at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml
from hydra._internal.hydra import Hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from trainkit.config.compose import Job, Sweep
from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.config.search_path import search_path
from trainkit.core.errors import ConfigError, TrainkitError, describe_bug
from trainkit.core.paths import claim_directory, display_path, update_latest_link
from trainkit.core.redaction import find_secrets, redact_by_key, redact_command_line
from trainkit.core.terminal import printable, printable_lines
from trainkit.engine.train import train
from trainkit.runs.directory import Run
from trainkit.sweeps.comparison import comparison_table, load_run


def sweep(checked: Sweep, overrides: Sequence[str], config_dir: str | None = None) -> int:
    """Train each combination of values through Hydra's launcher, and print a comparison, best first.

    Args:
        checked: from `compose_sweep`.
        overrides: the overrides of the command line, with the values to sweep over.
        config_dir: a folder of configs besides ./conf.

    Returns:
        The exit code: 10 if a run failed, else 0.

    Raises:
        ConfigError: everything that is wrong with the `_target_`s, or the sweep cannot start.
    """
    problems = [problem for job in checked.jobs for problem in job.settings.find_wrong_targets()]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if checked.more_jobs:
        print(f"note: only the first {len(checked.jobs)} runs were checked beforehand", file=sys.stderr)
    directory = claim_directory(checked.directory, exact=checked.directory_given)
    if not checked.directory_given:
        update_latest_link(directory, Path("outputs"))
    app = Hydra.create_main_hydra2("trainkit", search_path(config_dir))
    app.config_loader = checked.loader
    own = [f"hydra.sweep.dir='{directory}'", "hydra.output_subdir=null"]  # Hydra's copies would contain secrets
    given = [text for text in mark_new_arguments(overrides) if not text.lstrip("+").startswith("hydra.sweep.dir=")]
    try:
        returned = app.multirun(
            "config", partial(sweep_job, config_dir=config_dir), [*given, *own], with_log_configuration=False
        )
    except (HydraException, RuntimeError) as error:
        raise ConfigError(f"the sweep cannot start: {error}", hint="check hydra/sweeper and hydra/launcher") from error

    runs = [load_run(file.parents[1]) for file in sorted(directory.rglob(".hydra/overrides.yaml"))]
    print(printable_lines(comparison_table(runs)))
    failed = [run for run in runs if run.info.get("status") != "completed"]
    for run in failed:
        print(printable(f"failed: {' '.join(run.overrides)}: {display_path(run.directory)}"), file=sys.stderr)
    lost = [job for batch in returned or [] for job in batch if job.return_value is None]
    return 10 if failed or lost else 0


def sweep_job(config: DictConfig, config_dir: str | None = None) -> float | None:
    """Train one job of a sweep in the directory that Hydra created.

    Returns:
        The best monitored value, NaN if no epoch has one, None if the run failed.
    """
    job = Job.current()
    print(printable(f"run {job.number}: {' '.join(redact_command_line(job.overrides, ()))}"), file=sys.stderr)
    started = Run(job.directory)
    started.write_config(config, job.overrides, job.hydra)  # the record of a run that fails before it starts
    redact_file(job.sweep_directory / "multirun.yaml", started.secrets)
    try:
        run = train(job.composed(config, config_dir))
    except Exception as error:  # the other jobs continue
        print(error if isinstance(error, TrainkitError) else describe_bug(error), file=sys.stderr)
        return None
    return math.nan if run.best is None else float(run.best["value"])


def redact_file(path: Path, secrets: set[str]) -> None:
    """Remove secrets from a YAML file that Hydra wrote."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    clean = redact_command_line(redact_by_key(content), secrets | set(find_secrets(content)))
    if clean != content:
        path.write_text(yaml.safe_dump(clean, sort_keys=False), encoding="utf-8")

"""Several runs: a sweep over values, its jobs launched by Hydra, and the comparison at its end."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from trainkit.config.compose import Composed, Sweep, job_overrides
from trainkit.config.search_path import search_path
from trainkit.config.settings import read_settings
from trainkit.core.errors import ConfigError, TrainkitError
from trainkit.core.paths import claim_directory, display_path, update_latest_link
from trainkit.core.redaction import redact_command_line
from trainkit.display import text as tables
from trainkit.engine.train import train
from trainkit.runs.directory import Run, redact_file


def sweep(checked: Sweep, overrides: Sequence[str], config_dir: str | None = None) -> int:
    """Train each combination of values, through Hydra's launcher; then show them, best first.

    Args:
        checked: from `config.compose_sweep`.
        overrides: as on the command line, with the values to sweep over.
        config_dir: a folder of configs besides ./conf.

    Returns:
        The exit code: 10 where a run failed.
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
    place = [f"hydra.sweep.dir='{directory}'", "hydra.output_subdir=null"]  # Hydra's copies would hold secrets
    asked = [text for text in overrides if not text.lstrip("+").startswith("hydra.sweep.dir=")]
    try:
        returned = app.multirun("config", sweep_job, [*asked, *place], with_log_configuration=False)
    except (HydraException, RuntimeError) as error:
        raise ConfigError(f"the sweep cannot start: {error}", hint="see hydra/sweeper and hydra/launcher") from error

    runs = [Run.load(file.parents[1]) for file in sorted(directory.rglob(".hydra/overrides.yaml"))]
    print("\n".join(tables.comparison(runs)))
    failed = [run for run in runs if run.info.get("status") != "completed"]
    for run in failed:
        print(f"failed: {' '.join(run.overrides)}: {display_path(run.directory)}", file=sys.stderr)
    lost = [job for batch in returned or [] for job in batch if job.return_value is None]
    return 10 if failed or lost else 0


def sweep_job(config: DictConfig) -> float | None:
    """One job of a sweep, in the directory that Hydra made; its best monitored value, None if it failed."""
    hydra: Any = HydraConfig.get()
    overrides = job_overrides(hydra)
    print(f"run {hydra.job.num}: {' '.join(redact_command_line(overrides, ()))}", file=sys.stderr)
    directory = Path(hydra.runtime.output_dir)
    begun = Run(directory)
    begun.record(config, overrides, hydra)  # what fails before it runs is told of too
    redact_file(Path(hydra.sweep.dir) / "multirun.yaml", begun.secrets)
    try:
        done = train(Composed(read_settings(config), overrides, hydra, directory))
    except TrainkitError as error:  # the other jobs go on
        print(error, file=sys.stderr)
        return None
    return math.nan if done.best is None else float(done.best["value"])

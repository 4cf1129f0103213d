"""Run a search: in each job, the search is asked after every epoch whether the job continues."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from trainkit.config.jobs import compose_job
from trainkit.config.search_space import Space, find_active, read_space
from trainkit.config.settings import Settings, read_settings
from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.core.redaction import redact_command_line
from trainkit.display.jobs import SilentJobs, make_job_display
from trainkit.runs.secrets import secrets_of
from trainkit.sweeps.ledger import Ledger
from trainkit.sweeps.local import make_target
from trainkit.sweeps.pool import Pool, RunningJob
from trainkit.sweeps.recording import Recording
from trainkit.sweeps.resources import measure_capacity, most_devices
from trainkit.sweeps.saved_jobs import may_change
from trainkit.sweeps.search.asha import Asha
from trainkit.sweeps.search.jobs import SearchJobs
from trainkit.sweeps.search.study import SearchStudy
from trainkit.sweeps.search.worker import ANSWERS, Budget, Search, claim_worker


def run_search(plugin: Any, overrides: Sequence[str]) -> None:
    """Search until the budget is used; see `trainkit.sweeps.search.worker`.

    Args:
        plugin: the `TrainkitSweeper`, with what Hydra passed to it.
        overrides: of the command line, without those of Hydra.

    Raises:
        ConfigError: the search does not fit to the one in its directory.
        Stopped: a signal stopped the jobs, which have saved.
    """
    started = time.monotonic()
    config: DictConfig = plugin.config
    ledger = Ledger(Path(config.hydra.sweep.dir))
    loader = plugin.hydra_context.config_loader
    space = read_space(loader, overrides, plugin.params)
    find_active(space, lambda texts: (compose_job(loader, config, texts).config, []))  # `compose_sweep` has checked it
    own = [text for text in overrides if text.lstrip("+").startswith("search.")]
    settings = read_settings(compose_job(loader, config, [*own, *next(space.samples())]).config)
    worker, lock = claim_worker(ledger.directory)
    try:
        search = _open(plugin, ledger, space, settings, worker, started)
        options, devices = config.hydra.launcher, most_devices(config, overrides)
        capacity = measure_capacity(options.n_jobs, options.jobs_per_gpu, 2**31, str(config.device), devices)
        with make_job_display(settings.progress) as display:
            recording = SearchRecording(ledger, display, search, settings)
            Pool(capacity, make_target, recording, asks=True).run(search.tasks(), ahead=False)
    finally:
        lock.release()


def _open(plugin: Any, ledger: Ledger, space: Space, settings: Settings, worker: int, started: float) -> Search:
    """Return the search, with what is known from earlier commands."""
    options, mode = settings.search, settings.monitor.mode
    max_epochs = options.max_epochs or settings.epochs
    now = _describe(plugin.config, space, settings, max_epochs)
    before = ledger.search()
    if before is not None:
        _check_same(before, now, ledger)
    name = f"{ledger.directory.parent.name}/{ledger.directory.name}" if before is None else str(before["study"])
    study = SearchStudy(ledger.directory, name, options, space, mode, max_epochs)
    if study.trials() and ledger.search() is None:  # a process that shares this folder writes the ledger first
        cause = f"the study {name} in search.storage belongs to a search in another folder"
        raise ConfigError(cause, hint="choose another hydra.sweep.dir: its last two folders name the study")
    study.check_complete(max((job.trial for job in ledger.read() if job.trial is not None), default=-1))
    ledger.append({"event": "search", "study": name, "config_dir": plugin.config_dir, **now})

    def seed_overrides(seed: int) -> list[str]:
        texts = [f"seed={settings.seed + seed}"] if options.seeds > 1 else []
        return texts + ([f"epochs={options.max_epochs}"] if options.max_epochs is not None else [])

    trials = options.trials
    if options.sampler == "grid":
        trials = min(trials or len(study.sampler.grid), len(study.sampler.grid))
    minutes = options.minutes
    budget = Budget(trials, options.epochs, started + minutes * 60) if minutes else Budget(trials, options.epochs)
    asha = None
    if options.pruner == "asha" and max_epochs is not None:
        asha = Asha(options.min_epochs, max_epochs, options.reduction, mode)
    return Search(
        study,
        SearchJobs(
            plugin.hydra_context.config_loader,
            plugin.config,
            ledger,
            space.fixed,
            seed_overrides,
            settings.monitor.metric,
        ),
        options.seeds,
        mode,
        asha,
        options.pruner is not None and asha is None,
        budget,
        worker,
    )


def _describe(config: DictConfig, space: Space, settings: Settings, max_epochs: int | None) -> dict[str, Any]:
    """Return what the ledger says about a search."""
    options, secrets = settings.search, secrets_of(config)
    given = [*config.hydra.overrides.task, *config.hydra.overrides.hydra]
    given = [text for text in map(str, given) if not text.startswith(("hydra.sweep.dir=", "hydra.output_subdir="))]
    return {
        "overrides": [str(text) for text in redact_command_line(given, secrets)],
        "shared": [str(text) for text in redact_command_line(space.fixed, secrets)],
        "metric": settings.monitor.metric,
        "mode": settings.monitor.mode,
        "sampler": options.sampler,
        "pruner": options.pruner,
        "seed": options.seed,
        "seeds": options.seeds,
        "max_epochs": max_epochs,
        "min_epochs": options.min_epochs,
        "reduction": options.reduction,
        "axes": [axis.as_dict() for axis in space.axes],
    }


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], ledger: Ledger) -> None:
    """Raise `ConfigError` if the trials of two commands cannot be compared."""
    hint = "choose another hydra.sweep.dir, or repeat the command of the search as it was"
    if before["axes"] != now["axes"]:
        cause = f"the search in {display_path(ledger.directory)} varies other keys or other values"
        raise ConfigError(cause, hint=hint)
    shared = [
        {text for text in map(str, command.get("shared", [])) if not may_change(text.lstrip("+").partition("=")[0])}
        for command in (before, now)
    ]
    changed = sorted(shared[0] ^ shared[1])
    keys = ("metric", "mode", "pruner", "seeds", "max_epochs", "min_epochs", "reduction")
    changed += [f"search.{key}={now[key]}" for key in keys if before.get(key) != now[key]]
    if changed:
        cause = f"the search in {display_path(ledger.directory)} has another config: {', '.join(changed)}"
        raise ConfigError(cause, hint=hint)


class SearchRecording(Recording):
    """The observer of the pool of a search: the search answers the jobs, and learns how they end.

    Args:
        ledger: of the sweep.
        display: shows the jobs.
        search: answers the jobs.
        settings: of the first job.
    """

    def __init__(self, ledger: Ledger, display: SilentJobs, search: Search, settings: Settings) -> None:
        super().__init__(ledger, display, retries=settings.retries, fail_fast=settings.fail_fast is True)
        self.search = search

    def on_question(self, job: RunningJob, question: Any) -> str | None:
        """Return why the job stops after an epoch, or None."""
        why = self.search.decide(job.task.number, int(question))
        return None if why is None else ANSWERS[why]

    def outcome_of(self, job: RunningJob, exit_code: int | None) -> dict[str, Any]:
        """Return how a job ended: also that the search has stopped it."""
        outcome = super().outcome_of(job, exit_code)
        why = self.search.why_stopped(job.task.number)
        if outcome["status"] == "stopped" and why is not None:
            outcome |= {"status": why, "exit_code": 0}
        return outcome

    def on_end(self, job: RunningJob, exit_code: int | None) -> bool:
        """Record how a job ended; return whether to run it again."""
        again = super().on_end(job, exit_code)
        if not again:
            record = self.search.jobs.ended(job.task.number)
            self.search.on_job_end(job.task.number, record.status, record.value)
        return again

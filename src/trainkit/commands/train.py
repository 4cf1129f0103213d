"""Compose a config, build what it names, train."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit import config as configs
from trainkit import flags
from trainkit.errors import ConfigError, Stopped, TrainkitError

if TYPE_CHECKING:
    from trainkit.build import Training
    from trainkit.loop import State
    from trainkit.run import Run


def run(argv: Sequence[str]) -> int:
    """One training, a sweep with `-m`, or one of Hydra's flags that only show something."""
    args = flags.parse(argv)
    for file, why in configs.unread(args.config_dir):
        print(f"note: {file} goes unread: {why}", file=sys.stderr)
    if flags.show(args):
        return 0
    if args.multirun:
        return sweep(args)
    from trainkit import display

    try:
        composed = configs.compose_run(args.overrides, args.config_dir)
    except ConfigError as error:
        raise with_arguments(error) from error
    done = train(composed.config, composed=composed)
    print("\n".join(display.result(done)))
    return 0


def train(config: DictConfig, *, directory: Path | str | None = None, composed: configs.Composed | None = None) -> Run:
    """Train what a config names, in a run directory of its own.

    Args:
        config: from `trainkit.compose`.
        directory: for the run, new or empty; None: a new one under outputs/.
        composed: the config with the overrides and Hydra settings it came from, to be recorded.

    Returns:
        The run: its directory, its history, its best epoch.

    Raises:
        TrainkitError: with a clear message; `run.json` tells of it too.
    """
    from trainkit import build, display
    from trainkit.loop import fit
    from trainkit.run import Run

    config = configs.checked(copy.deepcopy(OmegaConf.create(config)))
    training = build.training(config)
    screen = display.make(config.progress)
    given = directory or (composed and composed.directory)
    run = Run(claim_directory(Path(given) if given else None))
    overrides, hydra = (composed.overrides, composed.hydra) if composed else ([], None)
    run.start(config, command=sys.argv, overrides=overrides, hydra=hydra, facts=facts(training))
    hooks = [*training.hooks.values(), Recorder(run), screen]
    try:
        for line in [*display.opening(run), *build.remarks(config, training)]:
            screen.say(line)
            run.note(line)
        with warnings.catch_warnings():
            # A loss that broadcasts its targets is nearly always a mistake; torch only warns of it.
            warnings.filterwarnings("error", message="Using a target size")
            fit(training.state, training.train, training.val, hooks)
    except (Stopped, KeyboardInterrupt) as error:
        run.finish("stopped", getattr(error, "exit_code", 130), str(error) or "SIGINT")
        raise
    except (Exception, SystemExit) as error:
        told = error if isinstance(error, TrainkitError) else build.blame(error, training)
        run.finish("failed", told.exit_code, told.problems[0].cause)
        raise told from error
    finally:
        screen.close()
    state = training.state
    early = f"stopped early: no better {state.monitor} for {state.patience} epochs"
    run.finish("completed", 0, early if state.stopped_early else None)
    return run


def sweep(args: argparse.Namespace) -> int:
    """Train each combination of values, through Hydra's launcher; then show them, best first."""
    from hydra._internal.hydra import Hydra

    checked = configs.compose_sweep(args.overrides, args.config_dir)
    from trainkit import build, display
    from trainkit.run import Run, claim, point_latest

    problems = [problem for job in checked.jobs for problem in build.target_problems(job.config)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if checked.more_jobs:
        print(f"note: only the first {len(checked.jobs)} runs were checked beforehand", file=sys.stderr)
    directory = claim(checked.directory, exact=checked.directory_given)
    if not checked.directory_given:
        point_latest(directory, Path("outputs"))
    app = Hydra.create_main_hydra2("trainkit", configs.search_path(args.config_dir))
    place = f"hydra.sweep.dir='{directory}'"
    asked = [text for text in args.overrides if not text.lstrip("+").startswith("hydra.sweep.dir=")]
    try:
        returned = app.multirun("config", sweep_job, [*asked, place], with_log_configuration=False)
    except (HydraException, RuntimeError) as error:
        raise ConfigError(f"the sweep cannot start: {error}", mend="see hydra/sweeper and hydra/launcher") from error

    runs = [Run.load(file.parents[1]) for file in sorted(directory.rglob(".hydra/overrides.yaml"))]
    print("\n".join(display.comparison(runs)))
    failed = [run for run in runs if run.info.get("status") != "completed"]
    for run in failed:
        print(f"failed: {' '.join(run.overrides)}: {display.short(run.directory)}", file=sys.stderr)
    lost = [job for batch in returned or [] for job in batch if job.return_value is None]
    return 10 if failed or lost else 0


def sweep_job(config: DictConfig) -> float | None:
    """One job of a sweep, in the directory that Hydra made; its best monitored value, None if it failed."""
    from hydra.core.hydra_config import HydraConfig

    hydra: Any = HydraConfig.get()
    print(f"run {hydra.job.num}: {' '.join(hydra.overrides.task)}", file=sys.stderr)
    composed = configs.Composed(config, hydra, list(hydra.overrides.task), Path(hydra.runtime.output_dir))
    try:
        done = train(config, composed=composed)
    except TrainkitError as error:  # the other jobs go on
        print(error, file=sys.stderr)
        return None
    return math.nan if done.best is None else float(done.best["value"])


class Recorder:
    """The hook that writes a run's history."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Append the epoch."""
        from trainkit.display import epoch_line

        self.run.append(metrics, best(state))
        self.run.note(epoch_line(state.epochs, metrics))


def with_arguments(error: ConfigError) -> ConfigError:
    """The same error with the arguments in it that a signature does not take, to tell all at once.

    Only where somebody wrote arguments of their own does the answer wait for the import that knows.
    """
    composed: configs.Composed | None = error.composed
    if composed is None or not (composed.own_files or _adds_arguments(composed)):
        return error
    from trainkit import build

    try:
        return ConfigError(*error.problems, *build.target_problems(composed.config))
    except OmegaConfBaseException:  # an interpolation that is told of already
        return error


def _adds_arguments(composed: configs.Composed) -> bool:
    nodes = [text.lstrip("+").partition("=")[0].rpartition(".")[0] for text in composed.overrides if text[:1] == "+"]
    added = [OmegaConf.select(composed.config, node, throw_on_missing=False) for node in nodes if node]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in added)


def best(state: State) -> dict[str, Any] | None:
    """What `run.json` tells of the best epoch."""
    if state.best is None:
        return None
    shown = {name: value for name, value in state.best.items() if name.startswith(("train/loss", "val/"))}
    return {"metric": state.monitor, "value": state.best[state.monitor], "epoch": state.best["epoch"]} | shown


def claim_directory(given: Path | None) -> Path:
    """The run's directory: the one asked for, or a new one under outputs/ that `latest` points at."""
    from trainkit.run import claim, default_directory, point_latest

    if given is not None:
        return claim(given, exact=True)
    directory = claim(default_directory())
    point_latest(directory, Path("outputs"))
    return directory


def facts(training: Training) -> dict[str, Any]:
    """What `run.json` tells of a training besides its course."""
    params = list(training.state.model.parameters())
    return {
        "device": str(training.state.device),
        "parameters": sum(p.numel() for p in params),
        "trainable_parameters": sum(p.numel() for p in params if p.requires_grad),
        "train_samples": training.train.samples,
        "val_samples": training.val.samples if training.val is not None else 0,
    }

"""Compose a config, build what it names, train."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trainkit import config as configs
from trainkit.errors import ConfigError, Stopped, TrainkitError

if TYPE_CHECKING:
    from trainkit.build import Training
    from trainkit.loop import State
    from trainkit.run import Run


def run(argv: Sequence[str]) -> int:
    """One training, a sweep with `-m`, or one of Hydra's flags that only show something."""
    args = configs.parse(argv)
    for file in configs.shadowed(args.config_dir):
        print(f"note: {file} goes unread, trainkit ships one of that name: rename it", file=sys.stderr)
    if configs.show(args):
        return 0
    if args.multirun:
        return sweep(args)
    from trainkit import display

    try:
        composed = configs.compose_run(args.overrides, args.config_dir)
    except ConfigError as error:
        raise with_arguments(error, args.overrides) from error
    done = train(composed.config, composed=composed)
    print("\n".join(display.result(done)))
    return 0


def train(
    config: DictConfig, *, directory: Path | None = None, composed: configs.Composed | None = None
) -> Run:
    """Train what a composed config names, in a run directory of its own.

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

    training = build.training(config)
    run = Run(claim_directory(directory, composed))
    overrides, hydra = (composed.overrides, composed.hydra) if composed else ([], None)
    run.start(config, command=sys.argv, overrides=overrides, hydra=hydra, facts=facts(training))
    screen = display.make(config.progress)
    for line in [*display.opening(run), *build.remarks(training)]:
        screen.say(line)
        run.note(line)
    try:
        with warnings.catch_warnings():
            # A loss that broadcasts its targets is nearly always a mistake; torch only warns of it.
            warnings.filterwarnings("error", message="Using a target size")
            fit(training.state, training.train, training.val, [*training.hooks, Recorder(run), screen])
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
    early = (
        f"stopped early: no better {state.monitor} for {state.patience} epochs"
        if state.stopped_early
        else None
    )
    run.finish("completed", 0, early)
    return run


def sweep(args: argparse.Namespace) -> int:
    """Train each combination of values, through Hydra's launcher; then show them, best first."""
    from hydra._internal.hydra import Hydra

    from trainkit import display
    from trainkit.run import Run, claim, point_latest

    settings = configs.compose_sweep(args.overrides, args.config_dir)
    chosen = any(override.startswith("hydra.sweep.dir=") for override in args.overrides)
    directory = claim(Path(settings.sweep.dir), exact=chosen)
    if not chosen:
        point_latest(directory, Path("outputs"))
    app = Hydra.create_main_hydra2("trainkit", configs.search_path(args.config_dir))
    place = f"hydra.sweep.dir='{directory}'"
    app.multirun("config", sweep_job, [*args.overrides, place], with_log_configuration=False)

    runs = [Run.load(file.parents[1]) for file in sorted(directory.rglob(".hydra/overrides.yaml"))]
    print("\n".join(display.comparison(runs)))
    failed = [run for run in runs if run.info.get("status") != "completed"]
    for run in failed:
        print(f"failed: {' '.join(run.overrides)}: {display.short(run.directory)}", file=sys.stderr)
    return 10 if failed else 0


def sweep_job(config: DictConfig) -> float:
    """One job of a sweep, in the directory that Hydra made; returns the best monitored value."""
    from hydra.core.hydra_config import HydraConfig

    hydra: Any = HydraConfig.get()
    print(f"run {hydra.job.num}: {' '.join(hydra.overrides.task)}", file=sys.stderr)
    composed = configs.Composed(config, hydra, list(hydra.overrides.task))
    try:
        done = train(configs.checked(config), directory=Path(hydra.runtime.output_dir), composed=composed)
    except TrainkitError as error:  # the other jobs go on
        print(error, file=sys.stderr)
        return math.nan
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


def with_arguments(error: ConfigError, overrides: Sequence[str]) -> ConfigError:
    """The same error with the `+arguments` in it that a signature does not take, to tell all at once.

    Only such a command waits for the import that knows signatures.
    """
    if error.config is None or not any(override.startswith("+") for override in overrides):
        return error
    from trainkit import build

    try:
        return ConfigError(*error.problems, *build.target_problems(error.config))
    except (TrainkitError, OmegaConfBaseException):
        return error


def best(state: State) -> dict[str, Any] | None:
    """What `run.json` tells of the best epoch."""
    if state.best is None:
        return None
    shown = {name: value for name, value in state.best.items() if name.startswith(("train/loss", "val/"))}
    return {"metric": state.monitor, "value": state.best[state.monitor], "epoch": state.best["epoch"]} | shown


def claim_directory(directory: Path | None, composed: configs.Composed | None) -> Path:
    """The run's directory: the one asked for, or a new one under outputs/ that `latest` points at."""
    from trainkit.run import claim, default_directory, point_latest

    if directory is not None:
        return claim(directory, exact=True)
    if composed is not None and any(o.startswith("hydra.run.dir=") for o in composed.overrides):
        return claim(Path(composed.hydra.run.dir), exact=True)
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

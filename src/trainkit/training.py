"""One training from config to finished run: built, recorded, displayed, and its end written down."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainkit import build, display
from trainkit.blame import blame
from trainkit.config import Composed, checked
from trainkit.errors import Stopped, TrainkitError
from trainkit.loop import State, fit, takes_batch_statistics
from trainkit.run import Run, claim, default_directory, point_latest


def train(config: DictConfig, *, directory: Path | str | None = None, composed: Composed | None = None) -> Run:
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
    config = checked(copy.deepcopy(OmegaConf.create(config)))
    training = build.training(config)
    screen = display.make(config.progress)
    given = directory or (composed and composed.directory)
    run = Run(claim_directory(Path(given) if given else None))
    overrides, hydra = (composed.overrides, composed.hydra) if composed else ([], None)
    run.start(config, command=sys.argv, overrides=overrides, hydra=hydra, facts=facts(training))
    run.write("params.json", training.params)
    hooks = [*training.hooks.values(), Recorder(run), screen]
    try:
        for line in [*display.opening(run), *remarks(config, training, overrides)]:
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
        told = error if isinstance(error, TrainkitError) else blame(error, training)
        run.finish("failed", told.exit_code, told.problems[0].cause)
        raise told from error
    finally:
        screen.close()
    state = training.state
    early = f"stopped early: no better {state.monitor} for {display.count(state.patience or 0, 'epoch')}"
    run.finish("completed", 0, early if state.stopped_early else None)
    return run


class Recorder:
    """The hook that writes a run's history."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Append the epoch."""
        self.run.append(metrics, best(state))
        self.run.note(display.epoch_line(state.epochs, metrics))

    def on_split(self, state: State) -> None:
        """Write down that memory ran out."""
        self.run.note(display.split_line(state))


def best(state: State) -> dict[str, Any] | None:
    """What `run.json` tells of the best epoch."""
    if state.best is None:
        return None
    shown = {name: value for name, value in state.best.items() if name.startswith(("train/loss", "val/"))}
    return {"metric": state.monitor, "value": state.best[state.monitor], "epoch": state.best["epoch"]} | shown


def claim_directory(given: Path | None) -> Path:
    """The run's directory: the one asked for, or a new one under outputs/ that `latest` points at."""
    if given is not None:
        return claim(given, exact=True)
    directory = claim(default_directory())
    point_latest(directory, Path("outputs"))
    return directory


def facts(training: build.Training) -> dict[str, Any]:
    """What `run.json` tells of a training besides its course."""
    sizes = [(row["count"], row["trainable"]) for row in training.params]
    return {
        "device": str(training.state.device),
        "parameters": sum(count for count, _ in sizes),
        "trainable_parameters": sum(count for count, trainable in sizes if trainable),
        "train_samples": training.train.samples,
        "val_samples": training.val.samples if training.val is not None else 0,
    }


def remarks(config: DictConfig, training: build.Training, overrides: Sequence[str] = ()) -> list[str]:
    """What a person should know of a training before it starts; `overrides` are what they asked for."""
    state, lines = training.state, []
    if not training.split_off and any(text.startswith("data.split=0") for text in overrides):
        lines.append("note: this data has a validation set, so nothing is split off; data.val=null uses data.split")
    norms = [module for module in state.model.modules() if takes_batch_statistics(module)]
    if state.micro_batch is not None and norms:
        layers = display.count(len(norms), "layer")
        lines.append(f"note: {layers} with batch statistics: they see {state.micro_batch} samples at a time")
    if any(not p.requires_grad for m in norms for p in m.parameters(recurse=False)):
        lines.append("note: frozen batch norm layers still follow the statistics of the batches they see")
    if state.ema is not None:
        lines.append(f"note: val/… is of the averaged weights, over about {1 / (1 - config.ema):,.0f} steps")
    return [*display.groups(training.params, [group.name for group in training.groups]), *lines]

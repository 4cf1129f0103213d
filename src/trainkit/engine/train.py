"""Train one run: settings -> session -> run directory -> fit -> result."""

from __future__ import annotations

import functools
import math
import shlex
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from trainkit.build.last_batch import check_last_batch
from trainkit.build.session import Session, build_session
from trainkit.build.sharding import check_shardable, shard_session
from trainkit.config.compose import Composed
from trainkit.config.settings import Settings, read_settings
from trainkit.core.errors import ConfigError, Stopped, StorageError, TrainkitError
from trainkit.core.machine import processes_to_start
from trainkit.core.paths import claim_directory, default_run_directory, display_path, update_latest_link
from trainkit.core.rank_group import joined_ranks
from trainkit.core.rng import seed_all
from trainkit.data.contents import data_facts
from trainkit.data.split import split_notes
from trainkit.display import live as display
from trainkit.display.text import count, param_group_table
from trainkit.engine.error_context import explain_error
from trainkit.engine.preprocessing import describe_preprocessing
from trainkit.engine.report import report_at_end
from trainkit.engine.signals import handle_signals
from trainkit.engine.summary import opening_lines
from trainkit.engine.teacher import name_teacher
from trainkit.engine.warm_start import WarmStart, prepare_warm_start
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.fingerprint import fingerprint, redacted_values
from trainkit.runs.frozen import FrozenWeights, frozen_names
from trainkit.runs.loggers import Loggers
from trainkit.runs.preprocessing import write_preprocessing
from trainkit.runs.recorder import Recorder
from trainkit.runs.saver import Restorer, Saver
from trainkit.training.first_batch import FirstBatch
from trainkit.training.loop import fit
from trainkit.training.objects import takes_batch_statistics
from trainkit.training.state import State
from trainkit.training.sync_batchnorm import is_synced
from trainkit.training.trial_validation import TrialValidation


def train(config: DictConfig | Composed, *, directory: Path | str | None = None, hooks: Sequence[Any] = ()) -> Run:
    """Train a config in a new run directory.

    Args:
        config: from `trainkit.compose`, or from `compose_run`.
        directory: the directory of the run, new or empty; default: a new one in outputs/.
        hooks: hooks besides those of the config. They are called last, and checkpoints do not contain them.

    Returns:
        The run: its directory, its history, its best epoch.

    Raises:
        TrainkitError: with a clear message, which `run.json` contains too.
        Stopped: a signal stopped the training; a checkpoint holds the state.
    """
    composed = config if isinstance(config, Composed) else Composed(read_settings(config))
    refuse_to_start(processes_to_start(composed.settings.devices, composed.settings.device))
    with joined_ranks() as ranks:
        earlier = ranks.first(ranks.recall("run"))  # torchrun has started these ranks again
        if earlier is not None:
            from trainkit.engine.resume import resume_after_restart  # which builds on this module

            return resume_after_restart(Path(earlier), composed, ranks, hooks)
        with ranks.together():
            settings, warm_start = prepare_warm_start(name_teacher(composed.settings))
            with display.ReadingProgress(settings.progress if ranks.is_first else "off") as on_progress:
                session = build_session(settings, on_progress, warm_start, ranks)
            check_last_batch(session.settings, session.state, session.train)
            check_shardable(session)
        prepare_rank(session)
        shard_session(session)
        loaded = warm_start.notes if warm_start is not None else []
        notes = [*composed.notes, *startup_notes(session, composed.overrides), *loaded]
        with ranks.together():
            run = None
            if ranks.is_first:
                run = _start_run(composed, settings, session, warm_start, directory)
                ranks.remember("run", str(run.directory))
        path = ranks.first(Path() if run is None else run.directory)
        run = run or Run(path)
        return run_training(run, session, notes, make_saver(run, session, first=True), hooks=hooks)


def refuse_to_start(number: int) -> None:
    """Raise `ConfigError` if a training needs several processes, which only the commands start."""
    if number > 1:
        hint = f"run the command trainkit, or start this script by torchrun --nproc-per-node {number}"
        raise ConfigError(f"devices={number}: a call from Python trains in this process alone", hint=hint)


def _start_run(
    composed: Composed,
    settings: Settings,
    session: Session,
    warm_start: WarmStart | None,
    directory: Path | str | None,
) -> Run:
    """Create the run directory, and write what is about to run."""
    is_debug = composed.hydra is not None and composed.hydra.runtime.choices.get("debug", "none") != "none"
    run = Run(new_run_directory(directory or composed.directory, debug=is_debug))
    run.start(
        settings,
        command=sys.argv,
        overrides=composed.overrides,
        hydra=composed.hydra,
        facts=session_facts(session) | ({"init_from": warm_start.facts} if warm_start is not None else {}),
    )
    return run


def run_training(
    run: Run,
    session: Session,
    notes: Sequence[str],
    saver: Saver | None,
    restorer: Restorer | None = None,
    *,
    hooks: Sequence[Any] = (),
) -> Run:
    """Train a session in a run that was started or resumed, and write how it ends.

    Args:
        run: its directory is locked.
        session: what the settings built.
        notes: lines that a user sees first.
        saver: the saver of the checkpoints; None: no checkpoints.
        restorer: the restorer of a resumed run.
        hooks: further hooks, called last.

    Raises:
        TrainkitError: see `train`.
        Stopped: see `train`.
    """
    state, started = session.state, time.monotonic()
    state.directory = run.directory
    state.objects.ranks.explain = functools.partial(explain_error, session=session)
    if not state.objects.ranks.is_first:
        _follow(run, session, _all_hooks(session, [*session.hooks.values(), restorer, saver], hooks), saver)
        return run
    recorder = Recorder(run, session.params)
    screen: Any = display.SafeDisplay(display.make_display(session.settings.progress))

    def report(line: str) -> None:
        screen.print_line(line)
        run.log(line)

    config = redacted_values(session.settings.source) if session.loggers else {}
    loggers = Loggers(run, session.loggers, config, report)
    called = _all_hooks(session, [*session.hooks.values(), restorer, recorder, saver, screen, loggers], hooks)
    state.objects.ranks.on_forced_end(functools.partial(_write_forced_end, run, loggers, screen))
    with handle_signals(state):
        try:
            write_preprocessing(run, describe_preprocessing(session.settings, session.train))
            for line in [*opening_lines(run), *notes]:
                report(line)
            _fit(run, session, called, saver)
        except KeyboardInterrupt as error:
            recorder.log_unreadable(state)
            _finish(run, loggers, "stopped", getattr(error, "exit_code", 130), str(error) or "SIGINT")
            raise
        except BaseException as error:
            explained = error if isinstance(error, TrainkitError) else explain_error(error, session)
            try:
                recorder.log_unreadable(state)
                _finish(run, loggers, "failed", explained.exit_code, explained.problems[0].cause)
            except StorageError as second:  # report both, the first cause first
                explained.problems += [problem for problem in second.problems if problem not in explained.problems]
            raise explained from error
        finally:
            screen.close()
            session.close()
        _finish(run, loggers, "completed", 0, _why_early(state))
    report_at_end(run, session.settings, started)
    return run


def _follow(run: Run, session: Session, hooks: list[Any], saver: Saver | None) -> None:
    """Train as a rank that writes no file and has no display."""
    with handle_signals(session.state):
        try:
            _fit(run, session, hooks, saver)
        except (TrainkitError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise explain_error(error, session) from error
        finally:
            session.close()


def _all_hooks(session: Session, own: Sequence[Any], more: Sequence[Any]) -> list[Any]:
    """Return the hooks in the order of their calls: `own` without None, the checks of the first steps, then `more`."""
    hooks = [hook for hook in own if hook is not None]
    hooks.append(FirstBatch(hooks))
    objects = session.state.objects
    has_custom_parts = bool(objects.val_metrics) or bool(objects.training_step or objects.evaluation_step)
    if session.val is not None and has_custom_parts and not session.settings.compile:  # it would compile one more shape
        hooks.append(TrialValidation(session.val.example))
    hooks += more
    return hooks


def _finish(run: Run, loggers: Loggers, status: str, exit_code: int, why: str | None) -> None:
    """Write how the run ended. The loggers come first, because `Run.finish` unlocks the directory."""
    try:
        loggers.finish(status, why)
    finally:
        run.finish(status, exit_code, why)


def _write_forced_end(run: Run, loggers: Loggers, screen: Any, error: TrainkitError | Stopped) -> None:
    """Write how the run ended, if the training still waits for a rank that was lost."""
    screen.close()
    status, why = ("stopped", str(error)) if isinstance(error, Stopped) else ("failed", error.problems[0].cause)
    _finish(run, loggers, status, error.exit_code, why)


def _why_early(state: State) -> str | None:
    """Return why the training ended before its planned end; None if it did not."""
    settings = state.settings
    if state.stopped_early:
        return f"stopped early: no better {settings.monitor} for {count(settings.patience or 0, 'epoch')}"
    if state.progress.out_of_time:
        return f"stopped after {settings.max_minutes:g} minute{'s' * (settings.max_minutes != 1)}: max_minutes"
    return None


def _fit(run: Run, session: Session, hooks: list[Any], saver: Saver | None) -> None:
    """Run the loop; save if a signal stops it, which all ranks do together."""
    state = session.state
    with warnings.catch_warnings():
        # A loss that broadcasts its targets is nearly always a mistake, but torch only warns.
        warnings.filterwarnings("error", message="Using a target size")
        try:
            with state.objects.ranks.broken_exchanges():
                fit(state, session.train, session.val, hooks)
            state.objects.ranks.wait()  # a rank may fail in `on_end`
        except Stopped as error:
            if error is state.stop and saver is not None:
                name = saver.save(state, planned=False)
                saver.collect(state, wait=True)
                error.saved = f"{name}; to continue: trainkit resume {shlex.quote(display_path(run.directory))}"
            raise
        finally:
            if saver is not None:  # the directory must not be unlocked before
                saver.abandon()


def make_saver(run: Run, session: Session, *, first: bool) -> Saver | None:
    """Return the hook that writes checkpoints, or None if `checkpoint` is off.

    Args:
        run: the run of the checkpoints.
        session: that is saved.
        first: save as the training starts, too.
    """
    options = session.settings.checkpoint
    if options is None:
        return None
    checkpoints = Checkpoints(run.directory / "checkpoints")
    frozen = FrozenWeights(session.state) if keeps_trainable(session.settings) else None
    return Saver(checkpoints, options, session_fingerprint(session), run, first=first, frozen=frozen)


def keeps_trainable(settings: Settings) -> bool:
    """Return whether the checkpoints hold only the weights that are trained."""
    return settings.checkpoint is not None and settings.checkpoint.weights == "trainable"


def session_fingerprint(session: Session) -> dict[str, Any]:
    """Return what the numbers of a run depend on: config and data exactly, the machine up to rounding."""
    state = session.state
    return {
        "config": fingerprint(session.settings),
        "epochs": session.settings.epochs,
        "steps": session.settings.steps,
        "data": data_facts(session.train, "training")
        | ({} if session.val is None else data_facts(session.val, "validation")),
        "machine": {
            "device": state.objects.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "micro_batch": session.settings.micro_batch,
            "memory_format": str(session.train.prepare.memory_format).removeprefix("torch.").removesuffix("_format"),
            "compile": session.settings.compile or "off",
            "ranks": state.objects.ranks.size,
        },
    }


def new_run_directory(given: Path | str | None, *, debug: bool = False) -> Path:
    """Create the directory of a run: the given one, or a new one in outputs/ that `latest` points at.

    A run with `debug` gets one in outputs/debug, and `latest` stays.

    Raises:
        RunDirectoryInUseError: the given directory holds a run.
        StorageError: the directory cannot be created.
    """
    if given is not None:
        return claim_directory(Path(given), exact=True)
    if debug:
        return claim_directory(Path("outputs/debug", *default_run_directory().parts[1:]))
    directory = claim_directory(default_run_directory())
    update_latest_link(directory, Path("outputs"))
    return directory


def prepare_rank(session: Session) -> None:
    """Give every rank the initial weights of rank 0, and its own random numbers, for example for dropout."""
    objects, settings = session.state.objects, session.settings
    modules = [objects.trained] + ([] if objects.ema is None else [objects.ema])
    objects.ranks.copy_first(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    if not objects.ranks.is_first:
        seed = zlib.crc32(f"{settings.seed} {objects.ranks.rank}".encode())
        seed_all(seed, deterministic=bool(settings.deterministic))


def session_facts(session: Session) -> dict[str, Any]:
    """Return the entries of `run.json` about the device, the model and the data."""
    sizes = [(row["count"], row["trainable"]) for row in session.params]
    return {
        "device": str(session.state.objects.device),
        "ranks": session.state.objects.ranks.size,
        "parameters": sum(count for count, _ in sizes),
        "trainable_parameters": sum(count for count, trainable in sizes if trainable),
        "train_samples": session.train.samples,
        "val_samples": session.val.samples if session.val is not None else 0,
        "classes": session.settings.data.classes,
    }


def startup_notes(session: Session, overrides: Sequence[str] = ()) -> list[str]:
    """Return the lines about a training that a user sees before it starts.

    Args:
        session: that is about to be trained.
        overrides: the overrides of the command line.
    """
    state, notes = session.state, split_notes(overrides, held_out=session.held_out)
    layers = [module for module in state.objects.model.modules() if takes_batch_statistics(module)]
    ranks = state.objects.ranks
    if state.progress.micro_batch is not None and layers:
        size = state.progress.micro_batch * (ranks.size if state.objects.synced else 1)
        notes.append(f"note: {count(len(layers), 'layer')} with batch statistics see {size} samples at a time")
    unsynced = [layer for layer in layers if not is_synced(layer)] if ranks.are_several else []
    if unsynced:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in unsynced}))
        text = f"note: {count(len(unsynced), 'layer')} with batch statistics ({kinds}) see the share of each rank"
        notes.append(f"{text}, so the results depend on the number of ranks")
    if any(not param.requires_grad for layer in layers for param in layer.parameters(recurse=False)):
        notes.append("note: frozen batch norm layers still update their running statistics")
    if keeps_trainable(session.settings):
        names = frozen_names(state)
        size = sum(session.named[name].numel() for name in names)
        text = f"checkpoints do not hold the {size:,} frozen parameters: a resume builds them again from the config"
        notes.append(
            text if names else "note: checkpoint.weights=trainable leaves out no parameter, as none stays frozen"
        )
    for group in session.groups:
        if (state.epochs or math.inf) <= group.frozen_epochs:
            notes.append(
                f"note: param group {group.name} stays frozen, because the run has {count(state.epochs or 0, 'epoch')}"
            )
    ema = session.settings.ema
    if ema is not None and session.val is not None:
        notes.append(f"note: val/… is of the averaged weights, over about {1 / (1 - ema):,.0f} steps")
    groups = param_group_table(session.params, [group.name for group in session.groups])
    return [*session.notes, *groups, *notes]

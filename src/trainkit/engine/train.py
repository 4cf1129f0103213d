"""Train one run: settings -> session -> run directory -> fit -> result."""

from __future__ import annotations

import functools
import shlex
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from trainkit.display import live as display
from trainkit.display.text import count
from trainkit.engine.error_context import explain_error
from trainkit.engine.preprocessing import describe_preprocessing
from trainkit.engine.report import report_at_end
from trainkit.engine.session_facts import keeps_trainable, session_facts, session_fingerprint, startup_notes
from trainkit.engine.signals import handle_signals
from trainkit.engine.summary import opening_lines
from trainkit.engine.teacher import name_teacher
from trainkit.engine.warm_start import WarmStart, prepare_warm_start
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.fingerprint import redacted_values
from trainkit.runs.frozen import FrozenWeights
from trainkit.runs.loggers import Loggers
from trainkit.runs.preprocessing import write_preprocessing
from trainkit.runs.recorder import Recorder
from trainkit.runs.saver import Restorer, Saver
from trainkit.training.first_batch import FirstBatch
from trainkit.training.loop import fit
from trainkit.training.state import State
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
    state, ranks, started = session.state, session.state.objects.ranks, time.monotonic()
    state.directory = run.directory
    ranks.explain = functools.partial(explain_error, session=session)
    with handle_signals(state):
        try:
            if ranks.is_first:
                _lead(run, session, notes, saver, restorer, hooks)
            else:  # without files and a display
                _fit(run, session, _all_hooks(session, [*session.hooks.values(), restorer, saver], hooks), saver)
        except (TrainkitError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise explain_error(error, session) from error
        finally:
            session.close()
    if ranks.is_first:
        report_at_end(run, session.settings, started)
    return run


def _lead(
    run: Run,
    session: Session,
    notes: Sequence[str],
    saver: Saver | None,
    restorer: Restorer | None,
    hooks: Sequence[Any],
) -> None:
    """Train as rank 0, which shows and records the training, and writes how it ends; see `run_training`."""
    state, recorder = session.state, Recorder(run, session.params)
    screen: Any = display.SafeDisplay(display.make_display(session.settings.progress))

    def report(line: str) -> None:
        screen.print_line(line)
        run.log(line)

    config = redacted_values(session.settings.source) if session.loggers else {}
    loggers = Loggers(run, session.loggers, config, report)
    called = _all_hooks(session, [*session.hooks.values(), restorer, recorder, saver, screen, loggers], hooks)
    state.objects.ranks.on_forced_end(functools.partial(_write_forced_end, run, loggers, screen))
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
    _finish(run, loggers, "completed", 0, _why_early(state))


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

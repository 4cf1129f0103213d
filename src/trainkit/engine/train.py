"""One training from config to finished run: built, recorded, displayed, and its end written down."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig

from trainkit.build import session as build
from trainkit.config.compose import Composed
from trainkit.config.settings import read_settings
from trainkit.core.errors import Stopped, StorageError, TrainkitError
from trainkit.core.paths import claim_directory, default_run_directory, display_path, update_latest_link
from trainkit.display import live as display
from trainkit.display.text import count, param_group_table
from trainkit.engine.error_context import explain_error
from trainkit.engine.summary import opening_lines
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.fingerprint import fingerprint
from trainkit.runs.recorder import Recorder, Restorer, Saver
from trainkit.training.loop import fit
from trainkit.training.state import State, takes_batch_statistics

# Those that stop a training. SIGHUP: the terminal is gone; SIGUSR1: a cluster takes the machine back.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

DOUBLED = 1.0  # seconds


def train(config: DictConfig | Composed, *, directory: Path | str | None = None) -> Run:
    """Train what a config names, in a run directory of its own.

    Args:
        config: from `trainkit.compose`, or what `compose_run` returns.
        directory: for the run, new or empty; None: a new one under outputs/.

    Returns:
        The run: its directory, its history, its best epoch.

    Raises:
        TrainkitError: with a clear message; `run.json` tells of it too.
        Stopped: by a signal, once no step was under way; a checkpoint holds where.
    """
    composed = config if isinstance(config, Composed) else Composed(read_settings(config))
    settings = composed.settings
    with display.ReadingProgress(settings.progress) as on_progress:
        session = build.build_session(settings, on_progress)
    given = directory or composed.directory
    run = Run(new_run_directory(Path(given) if given else None))
    lines = startup_notes(session, composed.overrides)
    facts = run_facts(session)
    run.start(settings, command=sys.argv, overrides=composed.overrides, hydra=composed.hydra, facts=facts)
    return run_training(run, session, lines, saver_of(run, session, first=True))


def saver_of(run: Run, session: build.Session, *, first: bool) -> Saver | None:
    """The hook that saves a run, where its config asks for checkpoints; with `first`, as it starts too."""
    options = session.settings.checkpoint
    if options is None:
        return None
    checkpoints = Checkpoints(run.directory / "checkpoints")
    return Saver(checkpoints, options, run_identity(session), first=first, note=run.note)


def run_training(
    run: Run,
    session: build.Session,
    lines: Sequence[str],
    saver: Saver | None,
    restorer: Restorer | None = None,
) -> Run:
    """Train what is built, in a run that is begun; write down how it ends.

    Args:
        run: started, or resumed.
        session: what it built.
        lines: what a person should know first.
        saver: of its checkpoints.
        restorer: of a resumed training.
    """
    state = session.state
    screen: Any = display.SafeDisplay(display.make_display(session.settings.progress))
    recorder = Recorder(run, session.params)
    hooks = [hook for hook in (*session.hooks.values(), restorer, recorder, saver, screen) if hook is not None]
    with signals_handled(state):
        try:
            for line in [*opening_lines(run), *lines]:
                screen.print_line(line)
                run.note(line)
            with warnings.catch_warnings():
                # A loss that broadcasts its targets is nearly always a mistake; torch only warns of it.
                warnings.filterwarnings("error", message="Using a target size")
                try:
                    fit(state, session.train, session.val, hooks)
                except Stopped as error:
                    if error is state.stop and saver is not None:
                        name = saver.save(state, planned=False)
                        error.saved = f"{name}; to go on: trainkit resume {shlex.quote(display_path(run.directory))}"
                    raise
        except KeyboardInterrupt as error:
            recorder.record_unreadable(state)
            run.finish("stopped", getattr(error, "exit_code", 130), str(error) or "SIGINT")
            raise
        except BaseException as error:
            told = error if isinstance(error, TrainkitError) else explain_error(error, session)
            try:
                recorder.record_unreadable(state)
                run.finish("failed", told.exit_code, told.problems[0].cause)
            except StorageError as second:  # the first cause is what matters
                told.problems += [problem for problem in second.problems if problem not in told.problems]
            raise told from error
        finally:
            screen.close()
            session.close()
        patience = count(state.settings.patience or 0, "epoch")
        early = f"stopped early: no better {state.settings.monitor} for {patience}"
        run.finish("completed", 0, early if state.stopped_early else None)
    return run


@contextmanager
def signals_handled(state: State) -> Iterator[None]:
    """Let a signal stop the training once no step is under way; a second one ends the process at once.

    What comes within `DOUBLED` seconds of the first is taken for the same: several may be told to tell it.
    """
    asked_at = math.inf

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal asked_at
        if state.stop is None:
            asked_at = time.monotonic()
            state.stop = Stopped(number)
            # One that follows at once may reach another thread, and be heard of only when this one next wakes up.
            time.sleep(0.05)
            if state.phase.interruptible:
                raise state.stop
        elif time.monotonic() - asked_at > DOUBLED:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # a live display has hidden the cursor
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    state.stop = Stopped.pending
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def run_identity(session: build.Session) -> dict[str, Any]:
    """What the numbers of a run depend on: its config and data exactly, its machine to rounding."""
    state = session.state
    return {
        "config": fingerprint(session.settings),
        "epochs": state.settings.epochs,
        "data": {"training samples": session.train.samples},
        "machine": {
            "device": state.objects.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "micro_batch": session.settings.micro_batch,
            "memory_format": str(session.train.prepare.memory_format).removeprefix("torch.").removesuffix("_format"),
            "compile": session.settings.compile or "off",
        },
    }


def new_run_directory(given: Path | None) -> Path:
    """The run's directory: the one asked for, or a new one under outputs/ that `latest` points at."""
    if given is not None:
        return claim_directory(given, exact=True)
    directory = claim_directory(default_run_directory())
    update_latest_link(directory, Path("outputs"))
    return directory


def run_facts(session: build.Session) -> dict[str, Any]:
    """What `run.json` tells of a training besides its course."""
    sizes = [(row["count"], row["trainable"]) for row in session.params]
    return {
        "device": str(session.state.objects.device),
        "parameters": sum(count for count, _ in sizes),
        "trainable_parameters": sum(count for count, trainable in sizes if trainable),
        "train_samples": session.train.samples,
        "val_samples": session.val.samples if session.val is not None else 0,
        "classes": session.settings.data.classes,
    }


def startup_notes(session: build.Session, overrides: Sequence[str] = ()) -> list[str]:
    """What a person should know of a training before it starts; `overrides` are what they asked for."""
    state, lines = session.state, []
    if not session.held_out and any(text.startswith("data.split=0") for text in overrides):
        lines.append("note: this data has a validation set, so nothing is split off; data.val=null uses data.split")
    norms = [module for module in state.objects.model.modules() if takes_batch_statistics(module)]
    if state.progress.micro_batch is not None and norms:
        layers = count(len(norms), "layer")
        lines.append(f"note: {layers} with batch statistics: they see {state.progress.micro_batch} samples at a time")
    if any(not p.requires_grad for m in norms for p in m.parameters(recurse=False)):
        lines.append("note: frozen batch norm layers still follow the statistics of the batches they see")
    ema = session.settings.ema
    if ema is not None:
        lines.append(f"note: val/… is of the averaged weights, over about {1 / (1 - ema):,.0f} steps")
    return [*session.notes, *param_group_table(session.params, [group.name for group in session.groups]), *lines]

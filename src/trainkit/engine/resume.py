"""Going back to a run: resume it where it stopped, or load its model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainkit.build import session as build
from trainkit.build.model import build_model
from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError, Problem
from trainkit.core.pytree import copy_to_cpu
from trainkit.core.rng import preserve_rng
from trainkit.display import live as display
from trainkit.engine.train import run_identity, run_training, saver_of, startup_notes
from trainkit.runs.checkpoint import Checkpoints, DamagedError
from trainkit.runs.directory import Run, find_run
from trainkit.runs.fingerprint import allowed, differences, fingerprint
from trainkit.runs.recorder import Restorer
from trainkit.runs.reload import reload_config
from trainkit.runs.snapshot import ORDER_KEYS, capture_state, check_types, refuse_mismatch, restore_state


def resume(run: Run | Path | str, overrides: Sequence[str] = ()) -> Run:
    """Go on with a run where it stopped: the same directory, the same history, the same bits.

    Args:
        run: it, its directory, or `last`.
        overrides: values to change, such as `["epochs=40"]`; what changes the mathematics must be named
            in `resume.allow=[...]`.

    Returns:
        The run. One that is finished is returned as it is.

    Raises:
        ConfigError: an override is wrong.
        CheckpointError: there is nothing to go on from, or the config is another.
        RunDirectoryInUseError: a process is at work in it.
    """
    directory = run.directory if isinstance(run, Run) else find_run(str(run))
    run = Run.load(directory)
    if is_finished(run, overrides):
        return run
    settings, allow = reload_config(run, overrides)
    run.acquire()
    try:
        run = Run.load(directory, lock=run.lock)  # as the last process left it
        name, saved, lines = _newest(run)
        allow += allowed_before(run, name)
        anew = False
        with display.ReadingProgress(settings.progress) as on_progress:
            session = build.build_session(settings, on_progress)
        if saved is not None:
            with refuse_mismatch():
                check_types(saved)
                changed, more = compare(saved["fingerprint"], run_identity(session), session.settings, allow)
            lines += [*more, *_restored(session, saved, changed)]
            anew = bool(changed)
            if anew:  # nothing but the rates, say, is as it was saved
                saved = copy_to_cpu(capture_state(session.state, {}))
        if session.state.done and run.info.get("status") == "completed":
            return run
        which = Checkpoints(run.directory / "checkpoints").sum_of(name) if name else ""
        step, epoch = session.state.progress.step, session.state.progress.epoch + 1
        at = {"checkpoint": name, "sha256": which, "step": step, "epoch": epoch, "allow": allow}
        texts = [text for text in overrides if not text.startswith("resume.allow=")]
        every = [*(old for old in run.overrides if not _replaced(old, texts)), *texts]
        run.resume(settings, command=sys.argv, overrides=every, epoch=session.state.progress.epoch, at=at)
        lines = [_begin(session, name), *lines, *startup_notes(session)]
        restorer = Restorer(saved) if saved is not None else None
        saver = saver_of(run, session, first=anew or saved is None)
        del saved  # which the restorer lets go of
        return run_training(run, session, lines, saver, restorer)
    finally:
        run.lock.release()


def allowed_before(run: Run, name: str | None) -> list[str]:
    """What the last resume was allowed to change, if it was killed before its first checkpoint."""
    resumed = run.info.get("resumed")
    last = resumed[-1] if isinstance(resumed, list) and resumed else None
    if name is None or not isinstance(last, dict) or last.get("checkpoint") != name:
        return []
    same = last.get("sha256") == Checkpoints(run.directory / "checkpoints").sum_of(name)
    return list(map(str, last.get("allow", []))) if same else []


def is_finished(run: Run, overrides: Sequence[str] = ()) -> bool:
    """Whether nothing is left to do in a run, as far as its files tell."""
    return run.info.get("status") == "completed" and not overrides


def load(run: Run | Path | str, checkpoint: str = "best", overrides: Sequence[str] = ()) -> nn.Module:
    """The model of a run with the weights it had, in evaluation mode, on the CPU; with `ema`, the averaged ones.

    The model is built from the run's config, which is trusted as any config is.

    Args:
        run: it, its directory, or `last`.
        checkpoint: `best`, or `last`.
        overrides: values that the run's files do not hold, such as `["model.hub_token=…"]`.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    if checkpoint not in ("best", "last"):
        raise ValueError(f"checkpoint is best or last, not {checkpoint!r}")
    run = run if isinstance(run, Run) else Run.load(find_run(str(run)))
    checkpoints = Checkpoints(run.directory / "checkpoints")
    name = checkpoints.pointed(checkpoint)
    if name is None:
        raise CheckpointError(f"{run.directory} has no {checkpoint} checkpoint", hint="train an epoch of it first")
    try:
        saved = checkpoints.load(name)
    except DamagedError as error:
        raise CheckpointError(f"{checkpoints.directory / name}: {error}", hint="try checkpoint='last'") from error
    settings, _ = reload_config(run, overrides, only="model")
    settings = settings.with_data(classes=run.info.get("classes"))
    with preserve_rng():
        model = build_model(settings.model, None, torch.device("cpu"))
    weights = saved["model"]
    if saved["ema"] is not None:
        prefix = "module.model."
        weights = {key.removeprefix(prefix): v for key, v in saved["ema"].items() if key.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{name} is of another model: {text}", hint="use the code it was trained with") from error
    return model.eval()


# ------------------------------------------------------------------------------------- what has changed


def compare(
    there: Mapping[str, Any], here: Mapping[str, Any], settings: Settings, allow: Sequence[str]
) -> tuple[set[str], list[str]]:
    """The top-level keys in which the run's config is another now, and what to say of it.

    What follows from a longer `epochs` alone, in the schedulers, is allowed.

    Raises:
        CheckpointError: a difference that changes the mathematics and is not allowed, each with both values.
    """
    if not all(isinstance(there.get(key), dict) for key in ("config", "data", "machine")) or not there.get("epochs"):
        raise CheckpointError("the checkpoint does not say what it was trained with", hint="start a new run")
    as_planned = fingerprint(settings, epochs=there["epochs"])
    others = differences(there["config"], as_planned)
    by_epochs = differences(as_planned, here["config"])
    others |= {key: values for key, values in by_epochs.items() if not key.startswith("scheduler.")}
    others |= {f"data ({key})": values for key, values in differences(there["data"], here["data"]).items()}
    if "lr" in others:  # what merely follows the root's rate is that rate
        others = {k: v for k, v in others.items() if k == "lr" or not (k.endswith(".lr") and v == others["lr"])}
    refused = {key: values for key, values in others.items() if not allowed(_key(key), allow)}
    if refused:
        tops = ",".join(dict.fromkeys([*allow, *(_top(key) for key in refused)]))
        problems = [Problem(f"{key}: {old!r} in the checkpoint, {new!r} now") for key, (old, new) in refused.items()]
        hint = f"go on as it was, start a new run, or accept another course from here on: 'resume.allow=[{tops}]'"
        raise CheckpointError(*problems[:-1], Problem(problems[-1].cause, hint))
    lines = [f"note: {key} was {old!r}, and is {new!r} from here on" for key, (old, new) in others.items()]
    if by_epochs:
        lines.append(f"note: the scheduler is planned for {here['epochs']} epochs now, and goes on where it would be")
    machine = differences(there["machine"], here["machine"])
    lines += [f"note: {key} was {old}, and is {new}: equal to rounding only" for key, (old, new) in machine.items()]
    return {_top(key) for key in [*others, *by_epochs]}, lines


def _key(key: str) -> str:
    return key.partition(" (")[0]


def _top(key: str) -> str:
    return _key(key).partition(".")[0]


def _replaced(override: str, by: Sequence[str]) -> bool:
    key = override.lstrip("+").partition("=")[0]
    return any(text.lstrip("+").partition("=")[0] == key for text in by)


def _newest(run: Run) -> tuple[str | None, dict[str, Any] | None, list[str]]:
    """The checkpoint to go on from, None where the run was stopped before it had any; what to say of others."""
    checkpoints = Checkpoints(run.directory / "checkpoints")
    checkpoints.clean()
    if not checkpoints.names() and not run.history:
        return None, None, []
    name, saved, passed = checkpoints.newest()
    return name, saved, [f"note: passed over {why}" for why in passed]


def _restored(session: build.Session, saved: Mapping[str, Any], changed: set[str]) -> list[str]:
    state = session.state
    restore_state(state, saved, changed)
    if saved["batch"] and changed & ORDER_KEYS:
        return [f"note: epoch {state.progress.epoch + 1} begins again, as its batches are others now"]
    if state.progress.batch > len(session.train):
        raise CheckpointError(
            f"the checkpoint is at batch {state.progress.batch} of an epoch, which has {len(session.train)} here",
            hint="resume it with the data it was trained on",
        )
    return []


def _begin(session: build.Session, name: str | None) -> str:
    if name is None:
        return "resumed from the beginning: it was stopped before there was a checkpoint"
    state = session.state
    place = f", batch {state.progress.batch + 1} of {state.progress.batches}" if state.progress.batch else ""
    place = ", its validation" if state.progress.batch == state.progress.batches else place
    return f"resumed from {name}: epoch {state.progress.epoch + 1} of {state.settings.epochs}{place}"

"""Resume a run where it stopped: as `train`, with one restore in between."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainkit.build.last_batch import check_last_batch
from trainkit.build.session import Session, build_session
from trainkit.build.sharding import check_shardable, shard_session
from trainkit.config.compose import Composed
from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.core.pytree import copy_to_cpu
from trainkit.core.rank_group import joined_ranks
from trainkit.core.ranks import Ranks
from trainkit.display import live as display
from trainkit.display.text import count
from trainkit.engine.changes import Changes, find_changes
from trainkit.engine.session_facts import keeps_trainable, session_facts, session_fingerprint, startup_notes
from trainkit.engine.teacher import name_teacher
from trainkit.engine.train import make_saver, prepare_rank, refuse_to_start, run_training
from trainkit.engine.warm_start import prepare_warm_start
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.frozen import check_frozen, digest_of, frozen_names, lacks_frozen, with_frozen
from trainkit.runs.rank_states import state_of_rank
from trainkit.runs.recorder import best_epoch
from trainkit.runs.recovery import is_finished, recover_history, recover_run
from trainkit.runs.reload import Reloaded, read_for_resume, reload_config
from trainkit.runs.saver import Restorer
from trainkit.runs.sharded_checkpoint import gather_shards
from trainkit.runs.snapshot import ORDER_KEYS, capture_state, check_types, refuse_mismatch, restore_state
from trainkit.training.whole_batch import SPLIT_KEYS


def resume(run: Run | Path | str, overrides: Sequence[str] = ()) -> Run:
    """Continue a run in its directory where it stopped.

    Its results equal those of an uninterrupted run bit by bit.

    Args:
        run: a run, its directory, or `last`.
        overrides: values to change, such as `["epochs=40"]`. To change a key that affects the results, such as
            `lr`, add `"resume.allow=[lr]"`.

    Returns:
        The run. A completed run without overrides is returned unchanged.

    Raises:
        ConfigError: an override is wrong.
        CheckpointError: no checkpoint can be used, or the config differs from the one in the checkpoint.
        RunDirectoryInUseError: another process uses the directory.
    """
    with joined_ranks() as ranks:
        saved_run, reloaded = ranks.let_first(  # the other ranks may have no access to the directory
            lambda: read_for_resume(run.directory if isinstance(run, Run) else find_run(str(run)), overrides)
        )
        return saved_run if reloaded is None else continue_run(saved_run, reloaded)


def continue_run(run: Run, reloaded: Reloaded, *, hooks: Sequence[Any] = ()) -> Run:
    """Continue a run with settings from `reload_config`; see `resume`. Further hooks are called last."""
    refuse_to_start(reloaded.processes_to_start())
    with joined_ranks() as ranks:
        return _lock_and_continue(run, reloaded, ranks, hooks)


def resume_after_restart(directory: Path, composed: Composed, ranks: Ranks, hooks: Sequence[Any]) -> Run:
    """Continue the run of earlier ranks, which have failed; torchrun has started these ranks instead.

    Args:
        directory: of the run.
        composed: what the ranks were started with.
        ranks: the ranks.
        hooks: further hooks, called last.
    """
    run, reloaded = Run(directory), Reloaded(composed.settings, [*composed.overrides], [])
    with ranks.together():
        if ranks.is_first:  # the other ranks may have no access to the directory
            run = recover_run(directory)
            with suppress(ConfigError):  # the saved config may lack its secrets
                reloaded = reload_config(run, [])
    return _lock_and_continue(run, ranks.first(reloaded), ranks, hooks)


def _lock_and_continue(run: Run, reloaded: Reloaded, ranks: Ranks, hooks: Sequence[Any]) -> Run:
    with ranks.together():
        if ranks.is_first:
            run.acquire()
    try:
        return _continue_run(run, reloaded, ranks, hooks)
    finally:
        run.lock.release()


def _continue_run(run: Run, reloaded: Reloaded, ranks: Ranks, hooks: Sequence[Any]) -> Run:
    """Continue a run whose directory rank 0 has locked."""
    name, saved = None, None
    allow, notes = list[str](), list[str]()
    with ranks.together():
        if ranks.is_first:
            run = recover_run(run.directory, lock=run.lock)  # another process may have changed it before the lock
            name, saved, notes = newest_checkpoint(run)
            allow = [*reloaded.allow, *allowed_by_killed_resume(run, name)]
    name, saved, allow = ranks.first((name, saved, allow))
    saved = None if saved is None else state_of_rank(saved, ranks.rank)
    progress = reloaded.settings.progress if ranks.is_first else "off"
    with ranks.together(), display.ReadingProgress(progress) as on_progress:
        settings, warm_start = prepare_warm_start(name_teacher(reloaded.settings))
        if saved is not None and not (lacks_frozen(saved) or keeps_trainable(settings)):
            warm_start = None  # the checkpoint holds all weights
        session = build_session(settings, on_progress, warm_start, ranks)
        check_shardable(session)
    prepare_rank(session)
    shard_session(session)
    changes = Changes(set(), [])
    saved_history = None if saved is None else saved.get("history")
    if saved is not None:
        with ranks.together():
            changes, more = restore_session(session, saved, allow)
            notes += more
        if changes.keys:  # the saved state is no longer the state to restore
            states = saved.get("hooks", {})  # the hooks of the session have not started yet
            saved = {**copy_to_cpu(gather_shards(capture_state(session.state, {}, with_hooks=False))), "hooks": states}
    refuse_shorter_run(session)
    session.state.check_time()
    is_over = False
    with ranks.together():
        check_last_batch(session.settings, session.state, session.train)
        if ranks.is_first:
            is_over = (session.state.done or session.state.at_limit) and is_finished(run)
            if not is_over:
                notes += _reopen_run(run, session, settings, reloaded, name, allow, saved_history)
    if ranks.first(is_over):
        return run
    damaged = [f"note: {run.damage}; it is rebuilt from the checkpoint"] if run.damage else []
    notes = [_where(session, name), *damaged, *notes, *startup_notes(session)]
    restorer = Restorer(saved) if saved is not None else None
    saver = make_saver(run, session, first=bool(changes.keys) or saved is None)
    del saved  # the restorer frees its memory
    return run_training(run, session, notes, saver, restorer, hooks=hooks)


def _reopen_run(
    run: Run,
    session: Session,
    settings: Settings,
    reloaded: Reloaded,
    name: str | None,
    allow: list[str],
    saved_history: Any,
) -> list[str]:
    """Write that the run continues, and return notes about its files."""
    checkpoints, progress = Checkpoints(run.directory / "checkpoints"), session.state.progress
    notes = checkpoints.drop_damaged_best()
    history, note = recover_history(run, progress.epoch, saved_history)
    run.resume(
        settings,
        command=sys.argv,
        overrides=_merge_overrides(run.overrides, reloaded.overrides),
        history=history,
        facts={**session_facts(session), "best": best_epoch(session.state)},
        at={
            "checkpoint": name,
            "sha256": checkpoints.checksum_of(name) if name else "",
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "allow": allow,
        },
    )
    return [*notes, note] if note else notes


def refuse_shorter_run(session: Session) -> None:
    """Raise `ConfigError` if the run has begun more epochs than `epochs`, or made more updates than `steps`."""
    progress, epochs, steps = session.state.progress, session.settings.epochs, session.settings.steps
    begun = progress.epoch + (progress.batch > 0)
    if epochs is not None and epochs < begun:
        cause = f"epochs={epochs}: the run has begun epoch {begun}"
        raise ConfigError(cause, hint=f"write epochs={begun} or more; nothing was changed")
    if steps is not None and steps < progress.step:
        cause = f"steps={steps}: the run has made {count(progress.step, 'step')}"
        raise ConfigError(cause, hint=f"write steps={progress.step} or more; nothing was changed")


def newest_checkpoint(run: Run) -> tuple[str | None, dict[str, Any] | None, list[str]]:
    """Return the newest valid checkpoint, its content, and notes about damaged checkpoints.

    Name and content are None if the run stopped before its first checkpoint.

    Raises:
        CheckpointError: the run has trained, but no checkpoint is valid.
    """
    checkpoints = Checkpoints(run.directory / "checkpoints")
    checkpoints.clean()
    if not checkpoints.names() and not run.history:
        return None, None, []
    name, saved, damaged = checkpoints.newest()
    return name, saved, [f"note: skipped {reason}" for reason in damaged]


def restore_session(session: Session, saved: Mapping[str, Any], allow: Sequence[str]) -> tuple[Changes, list[str]]:
    """Restore a session from a checkpoint; return what has changed since, and notes for the user.

    Raises:
        CheckpointError: the checkpoint does not fit the session.
    """
    with refuse_mismatch():
        check_types(saved)
        changes = find_changes(saved["fingerprint"], session_fingerprint(session), session.settings, allow)
    model = session.state.objects.model
    names = frozen_names(session.state) if keeps_trainable(session.settings) else []
    built = digest_of(model, names)
    if lacks_frozen(saved):
        check_frozen(model, saved)
    restore_state(session.state, with_frozen(model, saved), changes.keys)
    if digest_of(model, names) != built:
        cause = "checkpoint.weights=trainable: the config does not build the frozen weights of this run again"
        raise CheckpointError(cause, hint="write checkpoint.weights=all")
    progress, machine = session.state.progress, session_fingerprint(session)["machine"]
    before = {"ranks": 1} | saved["fingerprint"]["machine"]  # older checkpoints have no ranks
    same_split = all(before.get(key) == machine[key] for key in ("micro_batch", "ranks"))
    # The run compared its micro batches before the first step. With other weights, rounding may decide otherwise.
    progress.split_checked = set(SPLIT_KEYS) if same_split and progress.step > 0 and not changes.keys else set()
    if saved["batch"] and changes.keys & ORDER_KEYS:
        return changes, [*changes.notes, f"note: epoch {progress.epoch + 1} starts again, as its batches have changed"]
    if progress.batch > len(session.train):
        raise CheckpointError(
            f"the checkpoint is at batch {progress.batch} of an epoch, which now has {len(session.train)}",
            hint="resume the run with the data that it was trained on",
        )
    stream = session.state.objects.stream
    note = None if stream is None else stream.resume_note(progress.epoch, progress.batch)
    return changes, [*changes.notes, *filter(None, [note])]


def allowed_by_killed_resume(run: Run, name: str | None) -> list[str]:
    """Return the keys that the last resume allowed to change, if it was killed before its first checkpoint."""
    resumed = run.info.get("resumed")
    last = resumed[-1] if isinstance(resumed, list) and resumed else None
    if name is None or not isinstance(last, dict) or last.get("checkpoint") != name:
        return []
    same = last.get("sha256") == Checkpoints(run.directory / "checkpoints").checksum_of(name)
    return list(map(str, last.get("allow", []))) if same else []


def _merge_overrides(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return all overrides; a new one replaces an old one of the same key."""

    def key(override: str) -> str:
        return override.lstrip("+").partition("=")[0]

    replaced = set(map(key, new))
    return [*(override for override in old if key(override) not in replaced), *new]


def _where(session: Session, name: str | None) -> str:
    """Return the line that says where the run continues."""
    if name is None:
        return "resumed from the beginning: the run stopped before its first checkpoint"
    state, progress = session.state, session.state.progress
    place = f"epoch {progress.epoch + 1}" + (f" of {state.epochs}" if state.epochs is not None else "")
    if progress.batch == progress.batches or state.ends_inside_epoch:
        place += ", its validation"
    elif progress.batch:
        place += f", batch {progress.batch + 1} of {state.planned_batches}"
    steps = state.settings.steps
    if steps is not None and not state.at_limit:
        place = f"step {progress.step + 1} of {steps}, {place}"
    return f"resumed from {name}: {place}"

"""Evaluate a saved run: its best weights on its validation data, or on other data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainkit.build.evaluation import CheckDataset, EvaluationSession, TrainingFacts, build_evaluation
from trainkit.config.settings import Settings
from trainkit.core.device import select_device
from trainkit.core.errors import CheckpointError, ConfigError, UserCodeError
from trainkit.core.paths import display_path
from trainkit.core.pytree import batch_size_of, copy_to_cpu
from trainkit.core.redaction import redact_command_line
from trainkit.core.rng import preserve_rng
from trainkit.data.contents import data_facts
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.data.split import split_notes
from trainkit.display.live import ReadingProgress
from trainkit.display.text import as_json, count
from trainkit.engine.error_context import explained_errors
from trainkit.engine.evaluation_data import check_other_data, class_names_of_run, data_changes, training_facts
from trainkit.engine.warm_start import prepare_warm_start
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.evaluation_config import EvaluationConfig, read_evaluation_config
from trainkit.runs.find import find_run
from trainkit.runs.frozen import check_frozen, lacks_frozen, with_frozen
from trainkit.runs.recovery import recover_run
from trainkit.runs.secrets import secrets_of
from trainkit.runs.snapshot import check_types, refuse_mismatch
from trainkit.runs.weight_files import read_checkpoint
from trainkit.training.class_counts import ClassCounts
from trainkit.training.evaluation import evaluate as evaluate_state
from trainkit.training.state import State

FORMATS = ("contiguous", "channels_last")


def evaluate(run: Run | Path | str, checkpoint: str = "best", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run, and return the numbers. Nothing is written.

    On the validation data of the run, the numbers are those of its history, bit for bit.

    Args:
        run: a run, its directory, or `last` for the newest run.
        checkpoint: `best`, `last`, or `step-N`. With `ema`, the averaged weights are evaluated.
        overrides: other data, metrics, or another machine: `["data.root=test", "device=cpu"]`.

    Returns:
        The metrics under `metrics`; for classes `classes` (a row for each class), `macro`, `weighted` and
        `confusion_matrix`; and what was evaluated: `run`, `checkpoint`, `epoch`, `step`, `samples`, `overrides`.

    Raises:
        ConfigError: an override is wrong, or there is no validation data.
        CheckpointError: the checkpoint is missing or damaged, or belongs to another model.
        DataError: the data cannot be read.
    """
    run = run if isinstance(run, Run) else recover_run(find_run(str(run)))
    if not (run.directory / "checkpoints").exists() and (run.directory / "sweep.jsonl").exists():
        raise ConfigError(f"{display_path(run.directory)} is a sweep", hint="name the directory of one of its jobs")
    return evaluate_run(run, checkpoint, read_evaluation_config(run, overrides))


def evaluate_run(run: Run, checkpoint: str, config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a run with a config from `read_evaluation_config`; see `evaluate`."""
    name, saved = read_checkpoint(run, checkpoint)
    with refuse_mismatch():
        check_types(saved)
    with preserve_rng(), ReadingProgress(config.settings.progress) as on_progress:
        facts, preprocessing = training_facts(run, config)
        check = None if config.has_own_data else partial(check_other_data, preprocessing=preprocessing)
        session, changes = _build(config, facts, saved, on_progress, check)
        with closing(session), _explained_errors(session, config):
            _restore(session.state, saved, config.saved_step)
            result = _describe(run, name, saved, session, config)
            del saved
            loader = _CountingLoader(session.val, on_progress)
            counts = _class_counts(session)
            metrics = evaluate_state(session.state, loader, on_outputs=counts.update)  # type: ignore[arg-type]
            found = counts.compute(class_names_of_run(session.val.dataset, preprocessing))
    notes = [*session.notes, *split_notes(config.overrides, held_out=session.held_out), *changes]
    if session.val.unreadable:
        notes.append(f"note: {count(len(session.val.unreadable), 'sample')} could not be read and did not count")
    if session.state.progress.micro_batch != session.settings.micro_batch:
        notes.append(f"note: memory ran out, so micro_batch={session.state.progress.micro_batch}")
    row = _row_of_history(run, result["step"], result["epoch"])
    result["epoch"] = result["epoch"] if row is None else row["epoch"]
    history = _compare(row, metrics) if config.repeats and row is not None else None
    result |= {"samples": loader.seen, "metrics": metrics, "history": history}
    return {**result, **(found or {"classes": None}), "notes": notes}


@contextmanager
def _explained_errors(session: EvaluationSession, config: EvaluationConfig) -> Iterator[None]:
    """Explain every error in the block. An error of the model with other data has the exit code of a config error."""
    try:
        with explained_errors(session):
            yield
    except UserCodeError as error:
        if not config.has_own_data and error.exit_code == 1:
            error.exit_code = ConfigError.exit_code
        raise


def _build(
    config: EvaluationConfig,
    facts: TrainingFacts | None,
    saved: Mapping[str, Any],
    on_progress: ReadingProgress,
    check_dataset: CheckDataset | None,
) -> tuple[EvaluationSession, list[str]]:
    """Build the session; return it with notes about data that differs from that of the training.

    The training data is built if the facts are missing, or if the validation data differs without it. The latter
    happens if a data set draws random samples, which depend on the data sets that were built before it.
    """
    settings = _with_memory_format(config, saved)
    initialize = None
    if lacks_frozen(saved):
        initialize = prepare_warm_start(settings)[1]
    session = build_evaluation(settings, facts, on_progress, initialize, check_dataset)
    step = session.state.objects.evaluation_step
    takes_progress = step is not None and step.takes_progress
    changes = data_changes(session, saved) if config.has_own_data else {}
    if session.train is None and config.has_own_data and (changes or takes_progress):
        session.close()
        session = build_evaluation(settings, None, on_progress, initialize)
        changes = data_changes(session, saved)
    notes = [
        f"note: the data is not that of the training: {key}: {old} then, {new} now"
        for key, (old, new) in changes.items()
    ]
    return session, notes


def _with_memory_format(config: EvaluationConfig, saved: Mapping[str, Any]) -> Settings:
    """Return the settings with the memory format of the training, if it ran on the same kind of device."""
    settings, machine = config.settings, saved["fingerprint"].get("machine", {})
    given = any(text.lstrip("+").startswith("memory_format=") for text in config.overrides)
    if given or not isinstance(machine, Mapping) or machine.get("memory_format") not in FORMATS:
        return settings
    if machine.get("device") != select_device(settings.device).type:
        return settings
    return replace(settings, memory_format=machine["memory_format"])


def _restore(state: State, saved: Mapping[str, Any], saved_step: str | None) -> None:
    """Restore what an evaluation uses of a checkpoint, with the counts that the validation of the training saw.

    Args:
        state: the state of a new session.
        saved: the content of the checkpoint.
        saved_step: the key of the evaluation step's state.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    objects, progress = state.objects, state.progress
    if lacks_frozen(saved):
        check_frozen(objects.model, saved)
        saved = with_frozen(objects.model, saved)
    with refuse_mismatch():
        objects.load_modules(saved)
        step = saved.get("steps", {}).get(saved_step)
        if step is not None:
            for own in objects.steps_with_state.values():  # the evaluation step, if it has a state
                own.load_state_dict(copy_to_cpu(step))
        has_ended = saved["batch"] == 0 and saved["epoch"] > 0  # the validation comes before an epoch is counted
        progress.step, progress.epoch = saved["step"], saved["epoch"] - has_ended
        progress.batch = progress.batches if has_ended else saved["batch"]


def _class_counts(session: EvaluationSession) -> ClassCounts:
    is_custom = session.state.objects.evaluation_step is not None
    return ClassCounts(session.state.objects.evaluated[1], session.settings.data.classes, is_custom=is_custom)


def _describe(
    run: Run, name: str, saved: Mapping[str, Any], session: EvaluationSession, config: EvaluationConfig
) -> dict[str, Any]:
    """Return what is evaluated, without secrets."""
    data = session.settings.data
    node = data.train if session.held_out else data.val
    contents = as_json(data_facts(session.val, "validation")).encode()
    return {
        "run": str(run.directory),
        "checkpoint": name,
        "checkpoint_sha256": Checkpoints(run.directory / "checkpoints").checksum_of(name),
        "epoch": saved["epoch"],
        "step": saved["step"],
        "ema": saved["ema"] is not None,
        "device": str(session.state.objects.device),
        "data": str((node or {}).get("_target_")),
        "data_sha256": hashlib.sha256(contents).hexdigest(),
        "overrides": redact_command_line(list(config.overrides), secrets_of(session.settings.source)),
    }


def _row_of_history(run: Run, step: int, epoch: int) -> dict[str, Any] | None:
    """Return the row of the history that was written with a checkpoint; None if it was saved within an epoch.

    The last epoch may be shorter than planned. It is in the history, and not counted in the checkpoint.
    """
    try:
        rows = [row for row in run.history if row.get("step") == step and row.get("epoch") in (epoch, epoch + 1)]
    except CheckpointError:
        return None
    return rows[0] if rows else None


def _compare(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that differ from those of an epoch, each with both values."""
    different = {key: [row[key], value] for key, value in metrics.items() if key in row and not _same(row[key], value)}
    return {"epoch": row["epoch"], "equal": not different, "differences": different}


def _same(old: Any, new: Any) -> bool:
    """Return whether a number in the history is the same; the history has null for NaN and infinity."""
    if isinstance(new, list) and isinstance(old, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return old == new or (old is None and isinstance(new, float) and not abs(new) < float("inf"))


class _CountingLoader:
    """A loader that counts its samples and shows the progress.

    Args:
        loader: of the validation data.
        on_progress: shows the number of samples.
    """

    def __init__(self, loader: Loader, on_progress: ReadingProgress) -> None:
        self.loader, self.on_progress, self.seen = loader, on_progress, 0

    def batches(self, epoch: int) -> Iterator[Batch]:
        """See `Loader.batches`."""
        for inputs, targets in self.loader.batches(epoch):
            yield inputs, targets
            self.seen += batch_size_of(inputs)
            if self.loader.samples is not None:
                self.on_progress("evaluating", self.seen, self.loader.samples)

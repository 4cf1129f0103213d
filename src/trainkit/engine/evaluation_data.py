"""The data of an evaluation: what a run recorded about its training data, and whether other data fits its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainkit.build.evaluation import EvaluationSession, TrainingFacts
from trainkit.core.errors import ConfigError
from trainkit.data.contents import data_facts, differing_facts
from trainkit.data.sample_errors import base_of
from trainkit.engine.preprocessing import as_tensors, class_names, preprocessing_of_run
from trainkit.runs.directory import Run
from trainkit.runs.evaluation_config import EvaluationConfig, read_evaluation_config
from trainkit.runs.preprocessing import Preprocessing, read_preprocessing
from trainkit.runs.reload import ALLOW

MAX_SHOWN = 5  # classes in a message


def training_facts(run: Run, config: EvaluationConfig) -> tuple[TrainingFacts | None, Preprocessing | None]:
    """Return the facts about the training data of a run that an evaluation needs, and the preprocessing of the run.

    The facts are None if the evaluation must build the training data. Other data is standardized by the statistics
    of the training data of the run.

    Raises:
        CheckpointError: the file of the preprocessing is damaged.
        DataError: an older run has no such file, and its training data cannot be read.
    """
    found, classes = read_preprocessing(run), run.info.get("classes")
    if config.needs_steps or "classes" not in run.info or not isinstance(classes, int | None):
        return None, found
    if config.settings.data.standardize is None:
        return TrainingFacts(classes), found
    if found is None and config.has_own_data:
        return None, None
    if found is None or found.standardize is None:
        own = read_evaluation_config(run, [text for text in config.overrides if text.startswith(ALLOW)]).settings
        found = preprocessing_of_run(run, own)
    statistics = None if found.standardize is None else as_tensors(found.standardize, torch.float64)
    return TrainingFacts(classes, statistics), found


def data_changes(session: EvaluationSession, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the facts in which the validation data differs from that of the training.

    Args:
        session: of the evaluation.
        saved: the content of the checkpoint.
    """
    before = saved["fingerprint"].get("data")
    return differing_facts(before, data_facts(session.val, "validation")) if isinstance(before, Mapping) else {}


def class_names_of_run(dataset: Any, preprocessing: Preprocessing | None) -> list[str] | None:
    """Return the names of the classes of a run; if it did not record them, those of the data set."""
    if preprocessing is not None and preprocessing.classes is not None:
        return preprocessing.classes
    return class_names(dataset)


def check_other_data(dataset: Any, preprocessing: Preprocessing | None) -> list[str]:
    """Check that other data numbers its classes, and encodes its columns, as the data of the run does; return notes.

    Raises:
        ConfigError: the same inputs or classes have other numbers.
    """
    if preprocessing is None:
        return []
    reader, saved = getattr(base_of(dataset), "reader", None), preprocessing.reader
    if isinstance(reader, Mapping) and saved is not None and reader.get("kind") == saved["kind"] == "table":
        _check_columns(reader, saved)
    names, expected = class_names(dataset), preprocessing.classes
    if names is None or expected is None or names == expected:
        return []
    number = {name: index for index, name in enumerate(expected)}
    moved = [name for index, name in enumerate(names) if number.get(name, index) != index]
    if len(names) == len(expected) and not moved:  # other names for the same numbers
        return [f"note: the classes of the data are {_shown(names)}; those of the run are {_shown(expected)}"]
    cause = f"the classes of the data are {_shown(names)}; those of the run are {_shown(expected)}"
    if moved:
        cause += f"; class {moved[0]!r} has the number {names.index(moved[0])}, and {number[moved[0]]} in the run"
    hint = "a class must have the same number in both: let `classes` of the data set be the list of the run"
    raise ConfigError(f"data: {cause}", hint=hint)


def _check_columns(reader: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if two tables encode their columns differently."""
    columns, expected = (_encoded_columns(found) for found in (reader, saved))
    if columns == expected:
        return
    pairs: Any = zip([*columns, None], [*expected, None], strict=False)
    name = next((old or new for new, old in pairs if new != old), ("?",))[0]
    cause = f"data.file: this table encodes the column {name!r} differently from that of the run"
    hint = "keep data.file and data.fill, which decide the encoding, and write data.val_file=FILE"
    raise ConfigError(cause, hint=hint)


def _encoded_columns(reader: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the name of each column with its words, and the mean or median that replaces its missing numbers."""
    fill = reader["fill"] if isinstance(reader.get("fill"), Mapping) else {}
    return [(name, (words, fill.get(name))) for name, words in reader["columns"].items()]


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more

"""Start a training from the weights of another training: the key `init_from`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.config.schema import InitFromSettings
from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError, ConfigError, Problem, named_errors
from trainkit.core.paths import display_path
from trainkit.core.spelling import did_you_mean
from trainkit.display.text import columns, count
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.checkpoint_files import STATE
from trainkit.runs.directory import Run
from trainkit.runs.find import find_last_run, find_run
from trainkit.runs.frozen import lacks_frozen
from trainkit.runs.weight_files import read_checkpoint, read_weights, weights_of
from trainkit.training.weights import (
    DTYPE,
    LAYOUT,
    MISSING,
    SHAPE,
    UNEXPECTED,
    Match,
    Mismatch,
    differing_prefix,
    match_weights,
    matching_names,
    nan_names,
    patterns_for,
)

MAX_ROWS = 12  # of a table of mismatches; run.json lists all mismatches
ORDER = [SHAPE, DTYPE, LAYOUT, MISSING, UNEXPECTED]  # the kinds that users rarely expect come first


class WarmStart:
    """Loads the weights that `init_from` names into a new model.

    Args:
        options: the section `init_from` of the config.

    Attributes:
        notes: lines for the user: which tensors were loaded, and which differ.
        facts: the same facts for `run.json`.
    """

    def __init__(self, options: InitFromSettings) -> None:
        self.options = options
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def __call__(self, model: nn.Module) -> None:
        """Load the weights into a model that was just built.

        Raises:
            ConfigError: a tensor differs that `missing` and `unexpected` do not allow, or a pattern allows no tensor.
            CheckpointError: the weights cannot be read.
        """
        path = Path(self.options.path or "")
        with named_errors(f"init_from={display_path(path)}"):
            weights, notes = self._read(path)
        match = match_weights(model, weights)
        self._check(match, display_path(path))
        match.load_into(model)
        name = self.facts.get("checkpoint")
        source = display_path(path) + (f", {name}" if name else "")
        summary = f"{count(len(match.found), 'tensor')} loaded"
        kinds = [item.kind for item in match.mismatches]
        summary += "".join(f", {kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        notes = [*notes, *match.notes, *_nan_notes(match)]
        self.notes = [f"weights from {source}: {summary}", *(f"  {note}" for note in notes)]
        self.notes += _table(match.mismatches)
        differing = {kind: [m.name for m in match.mismatches if m.kind == kind] for kind in dict.fromkeys(kinds)}
        self.facts |= {"loaded": len(match.found), **differing}

    def _read(self, path: Path) -> tuple[dict[str, Any], list[str]]:
        """Return the weights, and notes about them."""
        if not path.is_dir():
            weights, notes = read_weights(path)
            with path.open("rb") as file:
                self.facts = {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            return weights, notes
        run = Run.load(find_run(str(path)))
        try:
            name, saved = read_checkpoint(run, self.options.checkpoint)
        except CheckpointError as error:
            problems = [Problem(problem.cause, _other_checkpoint(run)) for problem in error.problems]
            raise CheckpointError(*problems) from error
        checksum = Checkpoints(run.directory / "checkpoints").checksum_of(name)
        self.facts = {"path": str(path), "checkpoint": name, "sha256": checksum}
        if lacks_frozen(saved):
            from trainkit.engine.load import load  # which needs this module

            return load(run, self.options.checkpoint).state_dict(), ["the frozen weights are built again"]
        notes = ["the weights are the moving average of the run"] if saved["ema"] is not None else []
        return weights_of(saved), notes

    def _check(self, match: Match, source: str) -> None:
        """Raise `ConfigError` if a mismatch is not allowed, or if a pattern allows no tensor."""
        problems = []
        refused: list[Mismatch] = []
        useful: dict[str, list[str]] = {}  # option -> the patterns that allow a mismatch
        for option, patterns in (("missing", self.options.missing), ("unexpected", self.options.unexpected)):
            mismatches = [item for item in match.mismatches if item.option == option]
            names = [item.name for item in mismatches]
            useful[option] = [pattern for pattern in patterns if matching_names([pattern], names)]
            for pattern in patterns:
                if pattern not in useful[option]:
                    cause = f"init_from.{option}: no {option} tensor of {source} matches the pattern {pattern}"
                    hint = f"remove the pattern: there is no {option} tensor"
                    problems.append(Problem(cause, did_you_mean(pattern, names) if names else hint))
            refused += [item for item in mismatches if item.name not in matching_names(patterns, names)]
        if refused or not match.found:
            hint = _override(refused, useful) if match.found else "write the path of other weights, or init_from=off"
            problems.append(Problem(_refusal(source, refused or match.mismatches, match), hint))
        if problems:
            raise ConfigError(*problems)


def prepare_warm_start(settings: Settings) -> tuple[Settings, WarmStart | None]:
    """Return the settings with the absolute path of the weights, and the `WarmStart`; None if `init_from` is off.

    With the absolute path, the saved config does not depend on the working directory, and `last` stays the same run.

    Raises:
        ConfigError: the run that `init_from` names does not exist.
    """
    options = settings.init_from
    if options is None or options.path is None:
        return settings, None
    is_last = options.path == "last"
    with named_errors(f"init_from={'last' if is_last else display_path(Path(options.path))}"):
        path = find_last_run() if is_last else Path(options.path).expanduser()
        if path.is_dir():
            path = find_run(str(path))
    settings = settings.with_init_path(str(path.resolve()))
    assert settings.init_from is not None
    return settings, WarmStart(settings.init_from)


def _nan_notes(match: Match) -> list[str]:
    """Return the note about tensors that contain NaN."""
    names = nan_names(match.found)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"note: NaN is in {', '.join(names[:3])}{more}"] if names else []


def _other_checkpoint(run: Run) -> str:
    """Return the hint that names the best, last or newest checkpoint of a run that can be read."""
    for checkpoint in ("best", "last"):
        with suppress(CheckpointError):
            read_checkpoint(run, checkpoint)
            return f"write init_from.checkpoint={checkpoint}"
    with suppress(CheckpointError):
        name = Checkpoints(run.directory / "checkpoints").newest()[0]
        return f"write init_from={display_path(run.directory / 'checkpoints' / name / STATE)}"
    return "start from another run, because this run has no checkpoint that can be read"


def _table(mismatches: list[Mismatch]) -> list[str]:
    """Return the lines of a table of mismatches."""
    if not mismatches:
        return []
    first = sorted(mismatches, key=lambda item: ORDER.index(item.kind))[:MAX_ROWS]
    rows = [[item.name, item.kind, item.weights, item.model] for item in first]
    more = [f"and {len(mismatches) - MAX_ROWS} more"] if len(mismatches) > MAX_ROWS else []
    return [*columns([["tensor", "difference", "in the weights", "in the model"], *rows]), *more]


def _refusal(source: str, refused: list[Mismatch], match: Match) -> str:
    """Return the text about mismatches that are not allowed: a table, and the number of tensors that fit."""
    matched = len(match.found)
    counted = f"{count(matched, 'tensor')} of the model {'matches' if matched == 1 else 'match'}"
    cause = f"init_from={source}: the weights do not match the model"
    names = {kind: [item.name for item in match.mismatches if item.kind == kind] for kind in (UNEXPECTED, MISSING)}
    notes = [*match.notes, *filter(None, [differing_prefix(names[UNEXPECTED], names[MISSING])])]
    return "\n  ".join([cause, *_table(refused), counted, *notes])


def _override(refused: list[Mismatch], useful: Mapping[str, list[str]]) -> str:
    """Return the hint with the overrides that allow the mismatches. They repeat the patterns that are useful."""
    written = []
    for option, patterns in useful.items():
        names = [item.name for item in refused if item.option == option]
        if names:
            written.append(f"'init_from.{option}=[{','.join([*patterns, *patterns_for(names)])}]'")
    return f"to start all the same, write {' '.join(written)}"

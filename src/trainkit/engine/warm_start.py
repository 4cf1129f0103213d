"""Start a training from other weights: the key `init_from`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.config.schema import InitFromSettings
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.paths import display_path
from trainkit.core.spelling import did_you_mean
from trainkit.display.text import columns, count
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.frozen import is_partial
from trainkit.runs.weight_files import read_checkpoint, read_weights, weights_of
from trainkit.training.weights import (
    DTYPE,
    MISSING,
    SHAPE,
    UNEXPECTED,
    Match,
    Mismatch,
    match_weights,
    matching,
    patterns_for,
)

MAX_ROWS = 12  # of a table of mismatches; run.json has all
ORDER = [SHAPE, DTYPE, MISSING, UNEXPECTED]  # those that are seldom expected come first


class WarmStart:
    """Gives a new model the weights that `init_from` names.

    Args:
        options: the section of the config.

    Attributes:
        notes: what was loaded and what was not, for the user.
        facts: the same for `run.json`.
    """

    def __init__(self, options: InitFromSettings) -> None:
        self.options = options
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def __call__(self, model: nn.Module) -> None:
        """Load the weights into a model that was just built.

        Raises:
            ConfigError: the weights differ from the model in other names than `missing` and `unexpected` allow.
            CheckpointError: the weights cannot be read.
        """
        path = Path(self.options.path or "")
        weights, notes = self._read(path)
        match = match_weights(model, weights)
        self._check(match, display_path(path))
        match.load_into(model)
        name = self.facts.get("checkpoint")
        source = display_path(path) + (f", {name}" if name else "")
        summary = f"{count(len(match.found), 'tensor')} loaded"
        kinds = [item.kind for item in match.mismatches]
        summary += "".join(f", {kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        self.notes = [f"weights from {source}: {summary}", *(f"  {note}" for note in [*notes, *match.notes])]
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
        name, saved = read_checkpoint(run, self.options.checkpoint)
        checksum = Checkpoints(run.directory / "checkpoints").checksum_of(name)
        self.facts = {"path": str(path), "checkpoint": name, "sha256": checksum}
        if is_partial(saved):
            from trainkit.engine.load import load  # which needs this module

            return load(run, self.options.checkpoint).state_dict(), ["the frozen weights are built again"]
        notes = ["the weights are the moving average of the run"] if saved["ema"] is not None else []
        return weights_of(saved), notes

    def _check(self, match: Match, source: str) -> None:
        """Raise `ConfigError` if a mismatch is not allowed, or a pattern allows nothing."""
        problems = []
        refused: list[Mismatch] = []
        useful: dict[str, list[str]] = {}  # the patterns that allow something
        for key, patterns in (("missing", self.options.missing), ("unexpected", self.options.unexpected)):
            items = [item for item in match.mismatches if (item.kind == UNEXPECTED) == (key == "unexpected")]
            names = [item.name for item in items]
            useful[key] = [pattern for pattern in patterns if matching([pattern], names)]
            for pattern in (pattern for pattern in patterns if pattern not in useful[key]):
                cause = f"init_from.{key}: no {key} tensor of {source} matches the pattern {pattern}"
                hint = did_you_mean(pattern, names) if names else f"remove the pattern: there is no {key} tensor"
                problems.append(Problem(cause, hint))
            refused += [item for item in items if item.name not in matching(patterns, names)]
        if refused:
            cause = f"init_from={source}: the weights do not match the model"
            sizes = (
                f"{count(len(match.found), 'tensor')} of the model {'matches' if len(match.found) == 1 else 'match'}"
            )
            lines = [*_table(refused), sizes, *match.notes]
            problems.append(Problem("\n  ".join([cause, *lines]), _override(refused, useful)))
        if problems:
            raise ConfigError(*problems)


def prepare_warm_start(settings: Settings) -> tuple[Settings, WarmStart | None]:
    """Return the settings with the absolute path of the weights, and what loads them; None if `init_from` is off.

    So the saved config does not depend on the working directory, and `last` stays the run that it was.

    Raises:
        ConfigError: there is no such run.
    """
    options = settings.init_from
    if options is None or options.path is None:
        return settings, None
    path = find_run("last") if options.path == "last" else Path(options.path).expanduser()
    if path.is_dir():
        path = find_run(str(path))
    settings = settings.with_init_path(str(path.resolve()))
    assert settings.init_from is not None
    return settings, WarmStart(settings.init_from)


def _table(mismatches: list[Mismatch]) -> list[str]:
    """Return the lines of a table of mismatches."""
    if not mismatches:
        return []
    first = sorted(mismatches, key=lambda item: ORDER.index(item.kind))[:MAX_ROWS]
    rows = [[item.name, item.kind, item.weights, item.model] for item in first]
    more = [f"and {len(mismatches) - MAX_ROWS} more"] if len(mismatches) > MAX_ROWS else []
    return [*columns([["tensor", "difference", "in the weights", "in the model"], *rows]), *more]


def _override(refused: list[Mismatch], given: Mapping[str, list[str]]) -> str:
    """Return the overrides that allow mismatches, besides those that the given patterns allow."""
    written = []
    for key, patterns in given.items():
        names = [item.name for item in refused if (item.kind == UNEXPECTED) == (key == "unexpected")]
        if names:
            written.append(f"'init_from.{key}=[{','.join([*patterns, *patterns_for(names)])}]'")
    return f"to start all the same, write {' '.join(written)}"

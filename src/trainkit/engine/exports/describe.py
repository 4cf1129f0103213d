"""Fill in the model card and the metadata of an export."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit import __version__
from trainkit.config.defaults import ABSENT
from trainkit.core.pytree import dtype_name
from trainkit.display.text import HIDDEN_METRICS
from trainkit.engine.exports.calls import SHAPE_SIZES, Named
from trainkit.engine.exports.card import Card, TensorRow
from trainkit.engine.exports.files import data_file
from trainkit.engine.exports.raw_inputs import reading_steps
from trainkit.engine.exports.source import Source
from trainkit.engine.report import run_facts
from trainkit.engine.summary import samples_text
from trainkit.runs.preprocessing import Preprocessing, Statistics
from trainkit.runs.untrusted import is_number

SHOWN = ("train/", "val/")  # the metrics of a card
AUTOCAST = (
    "The run was trained with precision={precision}: autocast is a part of the training, not of the model. This file "
    "computes in {dtype}, as its check did."
)


def metadata(source: Source, *, prepares_inside: bool = False) -> dict[str, str]:
    """Return the metadata of an exported file: the version, and JSON for the classes and the preprocessing.

    Args:
        source: what is exported.
        prepares_inside: whether the file takes raw inputs, and prepares them itself.
    """
    found = source.preprocessing
    facts = {} if found is None else {**asdict(found), "inside": prepares_inside}
    classes = facts.pop("classes", None)
    return {
        "trainkit_version": __version__,
        "classes": json.dumps(classes),
        "preprocessing": json.dumps(facts or None),
    }


def card(
    source: Source,
    file: Path,
    code: Sequence[str],
    *,
    checked: str,
    code_note: str = "",
    inputs: Sequence[Named] = (),
    outputs: Sequence[Named] = (),
    prepares_inside: bool = False,
    notes: Sequence[str] = (),
) -> str:
    """Return the model card of an exported file.

    Args:
        source: what is exported.
        file: the file.
        code: the lines that load it.
        checked: how it was compared with the model.
        code_note: what the lines need.
        inputs: the inputs of batches of `SHAPE_SIZES`.
        outputs: the outputs of both.
        prepares_inside: whether the file takes raw inputs, and prepares them itself.
        notes: further notes.
    """
    facts, settings, found = run_facts(source.run.directory), source.settings, source.preprocessing
    dtype = _dtypes(source)
    if settings.precision != "fp32":
        notes = [AUTOCAST.format(precision=settings.precision, dtype=dtype), *notes]
    metrics = {
        name: value
        for name, value in source.metrics.items()
        if name.startswith(SHOWN) and name not in HIDDEN_METRICS and is_number(value)
    }
    return Card(
        title=_title(source),
        facts={
            "file": f"`{file.name}`, {size(file)}",
            "model": f"`{_target(source)}`, {sum(p.numel() for p in source.model.parameters()):,} parameters, {dtype}",
            "weights": _weights(source),
            "data": _data(source),
            "checked": checked,
            "written by": f"trainkit {__version__} with torch {torch.__version__}",
        },
        code=code,
        code_note=code_note,
        inputs=_rows(inputs),
        outputs=_rows(outputs),
        preprocessing=[] if found is None else _steps(found, inside=prepares_inside),
        classes=None if found is None else found.classes,
        metrics=metrics,
        metrics_note=f"Of epoch {source.epoch}, with the data of the run.",
        settings=[(key, value) for key, _, value in facts.differences if not _is_derived(value)],
        notes=notes,
    ).text()


def size(file: Path) -> str:
    """Return the size of a file, with that of its data if it keeps the weights in a second file."""
    data = data_file(file)
    total = sum(path.stat().st_size for path in (file, data) if path.exists())
    unit, scale = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6) if total >= 1e6 else ("kB", 1e3)
    return f"{total / scale:.1f} {unit}" + (f", with `{data.name}`" if data.exists() else "")


def _title(source: Source) -> str:
    return str(source.settings.model.get("name") or type(source.model).__name__)


def _target(source: Source) -> str:
    kind = type(source.model)
    return f"{kind.__module__}.{kind.__qualname__}"


def _dtypes(source: Source) -> str:
    counts = Counter(dtype_name(p) for p in source.model.parameters())
    return ", ".join(counts) or "no dtype"


def _weights(source: Source) -> str:
    which = [f"checkpoint {source.checkpoint} of the run {source.run.directory.name}{_start(source)}"]
    best: Mapping[str, Any] = source.run.best or {}
    if source.epoch is None:
        which.append("written inside an epoch")
    elif best.get("epoch") == source.epoch:
        which.append(f"epoch {source.epoch}, the best by {best['metric']}")
    else:
        which.append(f"epoch {source.epoch}")
    which += [f"moving average (ema={source.settings.ema})"] if source.settings.ema else []
    return ", ".join(which)


def _start(source: Source) -> str:
    """Return when the run started; "" if its file does not say it."""
    with suppress(KeyError, TypeError, ValueError):
        return f"{datetime.fromisoformat(source.run.info['started']): of %Y-%m-%d}"
    return ""


def _is_derived(value: str) -> bool:
    """Return whether a setting is absent, or only refers to another key."""
    return value == ABSENT or re.fullmatch(r"\$\{[\w.]+\}", value) is not None


def _data(source: Source) -> str:
    samples = samples_text(source.run.info.get("train_samples"), "training")
    return f"`{source.settings.data.train['_target_']}`, {samples}"


def _rows(batches: Sequence[Named]) -> list[TensorRow]:
    """Return the rows of a table of inputs or outputs of batches of `SHAPE_SIZES`; [] if there are no batches."""
    if not batches:
        return []
    pairs = zip(*batches, strict=True)
    return [TensorRow(name, _shape(one, other), dtype_name(one)) for (name, one), (_, other) in pairs]


def _shape(one: Tensor, other: Tensor) -> str:
    """Return the shape of a tensor for any batch size N, given two of them."""
    return f"({', '.join(map(_size_text, one.shape, other.shape))})"


def _size_text(first: int, second: int) -> str:
    """Return a size of a tensor that is `first` and `second` for the batches of `SHAPE_SIZES`: 10, N, 4N, or ?."""
    if first == second:
        return str(first)
    factor = first // SHAPE_SIZES[0]
    is_multiple = (first, second) == (factor * SHAPE_SIZES[0], factor * SHAPE_SIZES[1])
    return f"{factor if factor > 1 else ''}N" if is_multiple else "?"


def _steps(found: Preprocessing, *, inside: bool) -> list[str]:
    """Return the steps from a raw input to the inputs of the model, in words."""
    steps = []
    if found.reader is not None:
        steps += reading_steps(found.reader)
    is_image = '"uint8"' in json.dumps(found.inputs)
    if inside:
        steps.append("The file takes raw inputs. The next steps are a part of it:")
    if is_image:
        steps.append("Divide uint8 values by 255.")
    statistics = found.standardize or found.normalize
    if statistics is not None:
        key = "data.standardize" if found.standardize else "data.normalize"
        steps.append(f"Subtract the mean and divide by the standard deviation ({key}): {_statistics_text(statistics)}.")
    if not steps:
        steps.append("The model takes the inputs as they are.")
    return steps


def _statistics_text(statistics: Statistics) -> str:
    parts = {"mean": statistics.mean, "std": statistics.std}
    if len(statistics.mean) > 8:
        return f"{len(statistics.mean)} numbers each, in the metadata of the file"
    return ", ".join(f"{name} {[float(f'{x:.6g}') for x in values]}" for name, values in parts.items())

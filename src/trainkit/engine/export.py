"""Export the model of a run to a file that others can load, checked against the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn.parameter import is_lazy

from trainkit.config.schema import Node
from trainkit.core.errors import CheckpointError, ConfigError, ExportError, UserCodeError
from trainkit.core.paths import display_path
from trainkit.core.spelling import did_you_mean
from trainkit.display.text import count
from trainkit.engine.exports import describe, onnx, program, safetensors, snippets
from trainkit.engine.exports.calls import BATCH_SIZES, SHAPE_SIZES, TRACED, Caller, Named, difference
from trainkit.engine.exports.files import (
    SUFFIXES,
    Destination,
    check_free,
    find_destination,
    staged,
    with_record,
)
from trainkit.engine.exports.loading import build, fill
from trainkit.engine.exports.nodes import without_secrets
from trainkit.engine.exports.source import Source, read_source
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run

OTHER_HINT = "nothing was written: try another format"
SIZES = ", ".join(map(str, BATCH_SIZES[:-1])) + f" and {BATCH_SIZES[-1]}"


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        file: the exported model.
        card: its model card.
        checked: how the file was compared with the model.
        difference: the largest difference of an output from that of the model; None: the outputs were not compared.
    """

    file: Path
    card: Path
    checked: str
    difference: float | None


def export(
    run: Run | Path | str,
    format: str,  # noqa: A002  # as the flag of the command
    output: Path | str = "",
    *,
    checkpoint: str = "best",
    overrides: Sequence[str] = (),
    with_preprocessing: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the model of a run to a file, with a model card, and check the file against the model.

    Moving averages of the weights (`ema`) are exported if the run has them. Low-rank adapters are merged.

    Args:
        run: a run, its directory, or `last` for the newest run.
        format: `onnx`, `torch` (a program of torch.export) or `safetensors` (the weights).
        output: a directory, or a file. "": `export/FORMAT` in the directory of the run.
        checkpoint: `best`, `last` or `step-N`.
        overrides: config values that are not saved, such as secrets: `["model.hub_token=…"]`.
        with_preprocessing: let the file take raw inputs, such as uint8 images, and prepare them itself.
        overwrite: replace files that are not an unchanged export of the run.

    Raises:
        ConfigError: an argument is wrong, a package is missing, or a file exists.
        CheckpointError: the checkpoint is missing or damaged.
        ExportError: the code of the model cannot be exported, or the export does not agree with the model.
        StorageError: the files cannot be written.
        UserCodeError: the model raised an error.
    """
    if format not in SUFFIXES:
        hint = did_you_mean(format, SUFFIXES, "--format ")
        raise ConfigError(f"--format {format}: there is no such format", hint=hint)
    if with_preprocessing and format == "safetensors":
        cause = "--with-preprocessing: a safetensors file holds weights, and no code"
        raise ConfigError(cause, hint="write --format onnx or torch")
    if format == "onnx":
        onnx.check_packages()
    elif format == "safetensors":
        safetensors.check_packages()
    run = run if isinstance(run, Run) else Run.load(find_run(str(run)))
    if (run.directory / "sweep.jsonl").exists():
        cause = f"{display_path(run.directory)} is a sweep"
        raise ConfigError(cause, hint="name the directory of one of its runs; trainkit compare shows the best first")
    destination = find_destination(run, format, str(output))
    if not overwrite:
        check_free(destination, run)
    source = read_source(run, checkpoint, overrides)
    caller = _caller(source, format, with_preprocessing=with_preprocessing)
    with staged(destination) as fresh:
        if format == "safetensors":
            made = _write_weights(source, caller, fresh)
        else:
            assert caller is not None
            made = _write_graph(source, caller, fresh, format)
    return Exported(destination.file, destination.card, made.checked, made.difference)


def _caller(source: Source, form: str, *, with_preprocessing: bool) -> Caller | None:
    """Return what calls the model with random inputs; None if the inputs are not known, and not needed.

    Raises:
        ExportError: the inputs are not known, or are not tensors.
    """
    sample, prepare = source.sample(), source.prepare()
    if sample is not None:
        caller = Caller(source.model, sample, lambda raw: prepare(raw, None)[0], prepares_inside=with_preprocessing)
        if form != "safetensors":
            caller.check_repeatable()
        return caller
    if form == "safetensors":
        return None
    hint = "write --format safetensors, which holds the weights alone"
    if source.preprocessing is None or source.preprocessing.inputs is None:
        cause = f"{display_path(source.run.directory)} does not record the inputs of its model, and its data is missing"
        raise ExportError(cause, hint=f"restore the data of the run, or {hint}")
    raise ExportError("the inputs of the model are not tensors, and an export takes tensors", hint=hint)


def _write_graph(source: Source, caller: Caller, fresh: Destination, form: str) -> Exported:
    """Write and check a file of the format `onnx` or `torch`, and its card."""
    writer = onnx if form == "onnx" else program
    inside = caller.prepares_inside
    writer.write(caller, fresh.file, describe.metadata(source, prepares_inside=inside))
    largest, outputs = _compare(caller, writer, fresh.file, form)
    load = snippets.load_onnx if form == "onnx" else snippets.load_program
    engine = "onnxruntime" if form == "onnx" else "torch"
    agree = f"differ from those of the model by at most {largest:.1e}" if largest else "equal those of the model"
    checked = f"the outputs of {SIZES} samples {agree}, in {engine}"
    text = describe.card(
        source,
        fresh.file,
        load(fresh.file.name, caller.random(TRACED)),
        checked=checked,
        inputs=[caller.random(samples).named for samples in SHAPE_SIZES],
        outputs=[outputs[samples] for samples in SHAPE_SIZES],
        prepares_inside=inside,
    )
    fresh.card.write_text(with_record(text, source.run, fresh.file), encoding="utf-8")
    return Exported(fresh.file, fresh.card, checked, largest)


def _compare(caller: Caller, writer: Any, file: Path, form: str) -> tuple[float, dict[int, Named]]:
    """Run an exported file; return the largest difference from the model, and the outputs for each batch size.

    Raises:
        ExportError: the file cannot be run, or an output differs by more than the tolerance of the format.
    """
    largest, outputs, run_file = 0.0, {}, None
    for samples in BATCH_SIZES:
        expected = caller.expected(samples)
        try:
            run_file = run_file or writer.Session(file)
            outputs[samples] = run_file(caller, samples)
        except Exception as error:  # onnxruntime and torch raise errors of many types
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            cause = f"the {form} export cannot be run with {count(samples, 'sample')}: {text}"
            raise ExportError(cause, hint=OTHER_HINT) from error
        found = difference(expected, outputs[samples])
        if not found <= writer.TOLERANCE:
            cause = f"the {form} export differs from the model by {found:.1e} for {count(samples, 'sample')}"
            raise ExportError(cause, hint=f"expected at most {writer.TOLERANCE:.0e}; {OTHER_HINT}")
        largest = max(largest, found)
    return largest, outputs


def _write_weights(source: Source, caller: Caller | None, fresh: Destination) -> Exported:
    """Write and check a file of the format `safetensors`, and its card."""
    state, tied = safetensors.untie(source.model)
    node, lazy, largest = _choose_node(source, caller, safetensors.with_tied(state, {safetensors.TIED: tied}))
    config = {safetensors.MODEL: json.dumps(without_secrets(node, source.settings))}
    safetensors.write(state, tied, fresh.file, {**describe.metadata(source), **config})
    safetensors.check(source.model, fresh.file)
    checked = "the weights equal those of the model bit by bit"
    checked += "" if largest is None else f", and so do the outputs of {SIZES} samples of a model built from the file"
    known = None if largest is None else caller  # only inputs that the model takes belong into the card
    call = None if known is None else known.random(TRACED)
    text = describe.card(
        source,
        fresh.file,
        snippets.load_weights(fresh.file.name, call, without_secrets(node, source.settings), lazy=lazy),
        checked=checked,
        code_note=snippets.needed_code(node),
        inputs=[known.random(samples).named for samples in SHAPE_SIZES] if known is not None else [],
        outputs=[known.expected(samples) for samples in SHAPE_SIZES] if known is not None else [],
    )
    fresh.card.write_text(with_record(text, source.run, fresh.file), encoding="utf-8")
    return Exported(fresh.file, fresh.card, checked, largest)


def _choose_node(source: Source, caller: Caller | None, state: Mapping[str, Any]) -> tuple[Node, bool, float | None]:
    """Return the config that builds the model again, whether its layers are lazy, and the difference of the outputs.

    The config without trainkit's wrappers is used if it builds the same model.

    Raises:
        ExportError: no config builds the same model.
    """
    expected: list[Named] | None = None
    if caller is not None:
        with suppress(UserCodeError, ExportError):  # the model takes no random inputs, or draws random numbers
            caller.check_repeatable()
            expected = [caller.expected(samples) for samples in BATCH_SIZES]
    for node in (source.node, source.settings.model):
        with suppress(CheckpointError, UserCodeError):
            built = build(node, "the config")
            lazy = any(map(is_lazy, built.parameters()))
            other = fill(built, state, "the config")
            if expected is None or caller is None:
                return node, lazy, None
            again = Caller(other, caller.sample, caller.prepare)
            found = [again.expected(samples) for samples in BATCH_SIZES]
            if all(difference(one, two) == 0 for one, two in zip(expected, found, strict=True)):
                return node, lazy, 0.0
    cause = "model: the config and the weights of the run do not give the same model again"
    raise ExportError(cause, hint="keep all state of the model in parameters and buffers; --format torch needs no code")

"""The format `onnx`: written by torch's exporter, checked with onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainkit.core.errors import ExportError
from trainkit.core.extras import import_extra
from trainkit.core.source import name_and_place
from trainkit.engine.exports.calls import TRACED, Caller, Named
from trainkit.engine.exports.graph import dynamic_sizes, quiet, trace

TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OTHER_HINT = "write --format torch, which holds any operation of torch"


def check_packages() -> None:
    """Raise `ConfigError` if a package that the format needs is not installed."""
    for package in PACKAGES:
        import_extra(package, "onnx", "--format onnx")


def write(caller: Caller, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a model as an ONNX file. Weights of more than 2 GB are in a second file beside it.

    Raises:
        ExportError: torch cannot follow the code of the model, or ONNX lacks an operation.
        OSError: the file cannot be written.
    """
    call = caller.random(TRACED)
    outputs = [name for name, _ in caller.expected(TRACED)]
    names: Any = {"input_names": call.names, "output_names": _unlike(outputs, call.names)}
    program = trace(caller)
    try:
        with quiet():
            shapes = dynamic_sizes(caller.model, call, "batch")
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
    except Exception as error:
        raise _conversion_error(error, caller) from error
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # such as the paths of the model's code
    made.model.metadata_props.update(metadata)
    made.model.producer_name = "trainkit"
    with quiet():
        made.save(file)


class Session:
    """Runs an ONNX file with onnxruntime on the CPU.

    Args:
        file: the file.
    """

    def __init__(self, file: Path) -> None:
        runtime = import_extra("onnxruntime", "onnx", "--format onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # errors are raised in any case
        self.session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, caller: Caller, samples: int) -> Named:
        """Return the outputs for the random batch of a caller, with their names."""
        call = caller.random(samples)
        feeds = {name: tensor.numpy() for name, tensor in zip(call.names, call.tensors, strict=True)}
        outputs = self.session.run(None, feeds)
        names = [output.name for output in self.session.get_outputs()]
        return [(name, torch.as_tensor(value)) for name, value in zip(names, outputs, strict=True)]


def _unlike(names: list[str], taken: list[str]) -> list[str]:
    """Return the names of the outputs, changed if an input has the same name."""
    return [f"{name}_output" if name in taken else name for name in names]


def _conversion_error(error: Exception, caller: Caller) -> ExportError:
    text = re.sub(r"\x1b\[\d+m", "", str(error))
    missing = re.search(r"[Nn]o (?:ONNX )?(?:decompositions|function)[^']*?'?([\w:]+\.[\w.]+)", text)
    summary = text.partition("## Exception summary")[2].split("\n\n")
    lines = [line.strip() for line in "\n".join(summary).splitlines() if line.strip()] or text.splitlines()
    reason = f"ONNX has no operation for {missing[1]}" if missing else " ".join(lines[0].split())
    cause = f"model: {name_and_place(caller.model)} cannot be converted to ONNX: {reason}"
    return ExportError(cause, hint=OTHER_HINT)

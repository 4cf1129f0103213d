"""The format `torch`: a program of `torch.export`, which any Python with torch loads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainkit.engine.exports.calls import Caller, Named, named_tensors
from trainkit.engine.exports.graph import quiet, trace

TOLERANCE = 1e-6


def write(caller: Caller, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a model as a program.

    Raises:
        ExportError: torch cannot follow the code of the model.
        OSError: the file cannot be written.
    """
    program, content = trace(caller), io.BytesIO()
    with quiet():
        torch.export.save(program, content, extra_files=dict(metadata))
    file.write_bytes(content.getbuffer())  # torch itself reports a full disk as an error without a reason


class Session:
    """Runs a program.

    Args:
        file: the file.
    """

    def __init__(self, file: Path) -> None:
        with quiet():
            self.module: Any = torch.export.load(file).module()

    def __call__(self, caller: Caller, samples: int) -> Named:
        """Return the outputs for the random batch of a caller, with their names."""
        call = caller.random(samples)
        with torch.no_grad():
            return named_tensors(self.module(*call.args, **call.kwargs), "outputs")

"""Functions as metrics."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.metrics.base import predictions_in


class Collected:
    """A function of all outputs and all targets as a metric, such as a rank correlation.

    It keeps every output and target in memory until the end of the epoch, and calls the function once.

    Args:
        function: a function of (outputs, targets), two tensors on the CPU, or its dotted path.
        higher_is_better: whether higher values are better, for `monitor.mode=auto`.
    """

    def __init__(self, function: str | Callable[[Tensor, Tensor], Any], higher_is_better: bool | None = None) -> None:
        if isinstance(function, str):
            module, _, name = function.rpartition(".")
            function = getattr(importlib.import_module(module), name)
        self.function: Any = function
        self.higher_is_better = higher_is_better
        self.reset()

    def reset(self) -> None:
        """Start again, with no batch."""
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Keep a batch."""
        self.outputs.append(predictions_in(outputs).cpu())
        self.targets.append(targets.cpu())

    def compute(self) -> Any:
        """Return the function's value; NaN without samples."""
        if not self.targets:
            return float("nan")
        return self.function(torch.cat(self.outputs), torch.cat(self.targets))

    def state_dict(self) -> dict[str, Any]:
        """Return the outputs and targets so far."""
        return {"outputs": list(self.outputs), "targets": list(self.targets)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.outputs, self.targets = list(saved["outputs"]), list(saved["targets"])

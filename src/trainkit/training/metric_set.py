"""The metric objects of a training: their updates, their values, and their state in the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.pytree import copy_to_cpu, map_tensors
from trainkit.metrics.base import predictions_in
from trainkit.training.metrics import Metrics

LOW_PRECISION = (torch.bfloat16, torch.float16)


class MetricError(Exception):
    """A metric returns a value that cannot be reported.

    Args:
        name: the name of the metric.
        cause: what it returns.
        hint: the fix.
    """

    def __init__(self, name: str, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.name, self.cause, self.hint = name, cause, hint


class MetricSet:
    """The metrics of the training data or of the validation data.

    Args:
        part: `train` or `val`.
        metrics: objects with `update(outputs, targets)`, `compute()` and `reset()`, by name.
        device: the device of the outputs.
    """

    def __init__(self, part: str, metrics: Mapping[str, Any], device: torch.device) -> None:
        self.part, self.metrics, self.device = part, dict(metrics), device
        self.incomplete: set[str] = set()  # metrics that have missed a part of the epoch
        self.reset()

    def __bool__(self) -> bool:
        return bool(self.metrics)

    def reset(self) -> None:
        """Begin an epoch or a validation."""
        self.incomplete = set()
        for metric in self.metrics.values():
            metric.reset()

    @torch.no_grad()
    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch, or a micro batch."""
        outputs = detach(outputs)
        for metric in self.metrics.values():
            metric.update(predictions_in(outputs) if _takes_tensors(metric, outputs) else outputs, targets)

    @torch.no_grad()
    def compute(self) -> Metrics:
        """Return the values as `part/NAME`, or `part/NAME/KEY` for each entry of a mapping.

        Raises:
            MetricError: a value is not a number, a list or a mapping of them.
        """
        values: Metrics = {}
        for name, metric in self.metrics.items():
            value = math.nan if name in self.incomplete else metric.compute()
            entries = {f"/{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {"": value}
            values |= {f"{self.part}/{name}{key}": _plain_value(name, item) for key, item in entries.items()}
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each metric."""
        return {name: {"class": _class_of(m), "state": metric_state(m, name)} for name, m in self.metrics.items()}

    def load_state_dict(self, saved: Mapping[str, Any], *, in_epoch: bool = False) -> None:
        """Restore what `state_dict` returned.

        Args:
            saved: the states. A metric of another class has no state here.
            in_epoch: the epoch has begun. A metric without a state is then NaN in this epoch.
        """
        self.reset()
        for name, metric in self.metrics.items():
            entry = saved.get(name)
            if entry is not None and entry["class"] == _class_of(metric):
                load_metric_state(metric, copy_to_cpu(entry["state"]), self.device)
            elif in_epoch:
                self.incomplete.add(name)


def detach(outputs: Any) -> Any:
    """Return outputs without their graph, and as float32 if autocast has made them smaller. The type stays."""
    if not isinstance(outputs, Tensor | Mapping | tuple | list):
        return outputs
    plain = map_tensors(outputs, lambda t: t.detach().float() if t.dtype in LOW_PRECISION else t.detach())
    if isinstance(outputs, Mapping) and type(outputs) is not dict:  # such as the outputs of Hugging Face's models
        try:
            return type(outputs)(**plain)
        except TypeError:
            return plain
    return plain


def metric_state(metric: Any, name: str = "") -> dict[str, Any]:
    """Return the state of a metric: that of torchmetrics, its `state_dict`, or its attributes."""
    parts = list(_torchmetrics_in(metric))
    if parts:
        if hasattr(metric, "items"):
            metric.items()  # a collection copies the states that its metrics share
        for part in parts:
            part.persistent(True)
        return {"states": dict(metric.state_dict()), "updates": [part._update_count for part in parts]}
    own = getattr(type(metric), "state_dict", None)
    if own is not None and own is not nn.Module.state_dict:
        return {"state_dict": metric.state_dict()}
    states = {"buffers": dict(metric.state_dict())} if own is not None else {}
    return states | {"attributes": _attributes(metric, name)}


def load_metric_state(metric: Any, saved: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `metric_state` returned. The tensors of attributes are moved to the device."""
    if "states" in saved:
        parts = list(_torchmetrics_in(metric))
        for part in parts:
            part.persistent(True)
        metric.load_state_dict(saved["states"])
        metric.to(device)  # torchmetrics keeps the loaded tensors
        for part, updates in zip(parts, saved["updates"], strict=True):
            part._update_count, part._computed = updates, None
        return
    if "state_dict" in saved:
        metric.load_state_dict(saved["state_dict"])
        return
    if "buffers" in saved:
        metric.load_state_dict(saved["buffers"])
    for name, value in saved["attributes"].items():
        setattr(metric, name, map_tensors(value, lambda tensor: tensor.to(device)))


def _torchmetrics_in(metric: Any) -> Iterator[Any]:
    """Yield the metrics of torchmetrics in a metric: itself, or those of a collection."""
    modules = metric.modules() if isinstance(metric, nn.Module) else ()
    return (module for module in modules if hasattr(module, "_defaults") and hasattr(module, "_update_count"))


def _takes_tensors(metric: Any, outputs: Any) -> bool:
    """Return whether a metric is of torchmetrics, and the outputs are a mapping with an entry of predictions."""
    return isinstance(outputs, Mapping) and bool({"logits", "out"} & outputs.keys()) and any(_torchmetrics_in(metric))


def _attributes(metric: Any, name: str) -> dict[str, Any]:
    try:
        attributes = vars(metric)
    except TypeError:  # a class with __slots__, or compiled code
        raise MetricError(name, "its state cannot be read", "define state_dict and load_state_dict") from None
    internal = vars(nn.Module()).keys() if isinstance(metric, nn.Module) else ()
    return {name: value for name, value in attributes.items() if name not in internal}


def _class_of(metric: Any) -> str:
    return f"{type(metric).__module__}.{type(metric).__qualname__}"


def _plain_value(name: str, value: Any) -> Any:
    """Return a value of a metric as Python numbers."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain_value(name, item) for item in value]
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    kind = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    cause = f"compute returns {kind}, which cannot be reported"
    raise MetricError(name, cause, "return a number, a list of numbers, or a mapping of names to numbers")

"""From the outputs of a model to the rows of a prediction: classes with probabilities, numbers, or nested lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainkit.core.pytree import map_tensors
from trainkit.losses import REGRESSION_LOSSES, FromModel


@dataclass(frozen=True)
class Scores:
    """What the outputs of a batch mean.

    Attributes:
        kind: `classes` (N, C), `labels` (N, C) of which several may be true, `numbers` (N, K), `maps` (N, C, ...), or
            `other`.
        values: probabilities, or the numbers; for `other` the outputs themselves.
        order: the classes are sorted by these values. The outputs themselves differ where probabilities are rounded.
    """

    kind: str
    values: Any
    order: Tensor | None = None

    def averaged(self, mirrored: Scores) -> Scores:
        """Return the mean of the scores of images and of their mirror images."""
        other = mirrored.values.flip(-1) if self.kind == "maps" else mirrored.values
        values = (self.values + other) / 2
        return Scores(self.kind, values, values)


def scores_of(loss_fn: nn.Module, outputs: Any, classes: int | None) -> Scores:
    """Return the scores of a batch of outputs.

    Cross entropies say what the outputs are. The outputs of another loss are classes if there is one for each class.
    """
    if isinstance(loss_fn, FromModel):
        logits = outputs.get(loss_fn.logits) if isinstance(outputs, Mapping) else getattr(outputs, loss_fn.logits, None)
        outputs = logits.movedim(-1, 1) if isinstance(logits, Tensor) and logits.dim() > 1 else outputs
    if not isinstance(outputs, Tensor) or not outputs.dim():
        return Scores("other", outputs)
    outputs = outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(loss_fn, nn.BCEWithLogitsLoss | nn.BCELoss) and outputs.dim() <= 2:
        is_logit = isinstance(loss_fn, nn.BCEWithLogitsLoss)
        values = outputs.double().sigmoid() if is_logit else outputs.double()
        if outputs.dim() == 2 and outputs.shape[1] > 1:
            return Scores("labels", values)
        values, order = values.reshape(-1, 1), outputs.reshape(-1, 1) - (0.0 if is_logit else 0.5)
        return Scores("classes", torch.cat([1 - values, values], 1), torch.cat([torch.zeros_like(order), order], 1))
    if isinstance(loss_fn, REGRESSION_LOSSES):
        return _numbers(outputs)
    known = isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
    if outputs.dim() > 1 and outputs.shape[1] > 1 and (known or outputs.shape[1] == classes):
        values = outputs.exp() if isinstance(loss_fn, nn.NLLLoss) else outputs.softmax(1)
        return Scores("classes" if outputs.dim() == 2 else "maps", values, outputs)
    return _numbers(outputs)


def _numbers(outputs: Tensor) -> Scores:
    return Scores("numbers", outputs.reshape(len(outputs), -1)) if outputs.dim() <= 2 else Scores("other", outputs)


@dataclass(frozen=True)
class RowFormat:
    """How the scores of a sample become a row.

    Attributes:
        names: of the classes; None: their numbers.
        targets: the names of the predicted numbers; None: unknown.
        top: the number of classes in a row, the most probable first.
        all_probabilities: add the probability of each class.
    """

    names: Sequence[str] | None = None
    targets: Sequence[str] | None = None
    top: int = 1
    all_probabilities: bool = False

    def rows(self, places: Sequence[Mapping[str, Any]], scores: Scores) -> list[dict[str, Any]]:
        """Return a row for each sample of a batch."""
        if scores.kind == "other":
            return [{**place, "outputs": _nested(scores.values, i)} for i, place in enumerate(places)]
        values = scores.values.cpu()
        order = values if scores.order is None else scores.order.cpu()
        make = {"classes": self._classes, "labels": self._labels, "numbers": self._numbers, "maps": self._map}
        return [{**place, **make[scores.kind](values[i], order[i], place)} for i, place in enumerate(places)]

    def _classes(self, values: Tensor, order: Tensor, _: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for rank, index in enumerate(best_first(order, self.top), start=1):
            suffix = f"_{rank}" if rank > 1 else ""
            row |= {f"class{suffix}": self._name(index), f"probability{suffix}": exact(values[index])}
        return row | (self._probabilities(values) if self.all_probabilities else {})

    def _labels(self, values: Tensor, _: Tensor, __: Mapping[str, Any]) -> dict[str, Any]:
        true = (values > 0.5).nonzero().flatten().tolist()
        return {"classes": [self._name(index) for index in true], **self._probabilities(values)}

    def _probabilities(self, values: Tensor) -> dict[str, Any]:
        return {"probabilities": {str(self._name(index)): exact(value) for index, value in enumerate(values)}}

    def _numbers(self, values: Tensor, _: Tensor, place: Mapping[str, Any]) -> dict[str, Any]:
        count = len(values)
        names = self.targets if self.targets is not None and len(self.targets) == count else None
        if names is None:
            names = ["prediction"] if count == 1 else [f"prediction_{number}" for number in range(1, count + 1)]
        names = [f"predicted_{name}" if name in place else name for name in names]
        return dict(zip(names, map(exact, values), strict=True))

    def _map(self, _: Tensor, order: Tensor, __: Mapping[str, Any]) -> dict[str, Any]:
        return {"map": order.argmax(0).tolist()}

    def _name(self, index: int) -> str | int:
        return index if self.names is None or index >= len(self.names) else self.names[index]


def best_first(order: Tensor, top: int) -> list[int]:
    """Return the positions of the largest values. The first of equal values comes first, as for `argmax`."""
    found: list[int] = order.argsort(descending=True, stable=True)[:top].tolist()
    first = int(order.argmax())  # argmax decides, also for NaN
    return [first, *(index for index in found if index != first)][:top]


def exact(value: Tensor) -> float | int:
    """Return a number that prints as the shortest text of its dtype: 0.9, not 0.8999999761581421."""
    number = value.item()
    if isinstance(number, float) and value.dtype == torch.float32:
        return float(str(np.float32(number)))
    return number


def _nested(outputs: Any, index: int) -> Any:
    """Return the outputs for one sample as nested lists."""
    if isinstance(outputs, list) and len(outputs) > index and not isinstance(outputs[0], Tensor):
        return _as_lists(outputs[index])  # one entry per sample, as of a detection
    if hasattr(outputs, "_asdict"):
        outputs = outputs._asdict()
    return _as_lists(map_tensors(outputs, lambda tensor: tensor[index] if tensor.dim() else tensor))


def _as_lists(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {str(key): _as_lists(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return [_as_lists(value) for value in part]
    return part.tolist() if isinstance(part, Tensor) else part

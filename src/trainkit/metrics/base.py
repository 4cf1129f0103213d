"""The base of the shipped metrics: named sums, and the predictions in a model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

ENTRIES = ("logits", "out")  # of outputs that are mappings: Hugging Face's models, torchvision's segmentation


class Metric:
    """Sums over a data set. A subclass adds the sums of a batch in `update`, and computes its value from them."""

    higher_is_better: ClassVar[bool | None] = None

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def reset(self) -> None:
        """Start again, with no batch."""
        self.sums = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor to the sum of this name.

        Raises:
            ValueError: the shape differs from that of earlier batches, such as another number of classes.
        """
        before = self.sums.get(name)
        if before is None:
            self.sums[name] = value
            return
        if before.shape != value.shape:
            sizes = f"{tuple(before.shape)}, then {tuple(value.shape)}"
            raise ValueError(f"the number of outputs differs between batches: {sizes}")
        self.sums[name] = before.to(value.device) + value

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return dict(self.sums)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the sums."""
        self.sums = dict(saved)


def predictions_in(outputs: Any) -> Tensor:
    """Return the tensor of predictions in a model's outputs: the outputs, or their entry `logits` or `out`.

    Raises:
        TypeError: there is no such tensor.
    """
    if isinstance(outputs, Mapping):
        outputs = next((outputs[name] for name in ENTRIES if isinstance(outputs.get(name), Tensor)), outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the outputs are a {type(outputs).__name__}, expected a tensor, or a mapping with logits or out"
        )
    return outputs


def high_precision(tensor: Tensor) -> Tensor:
    """Return a tensor as float64, or as float32 on Apple GPUs."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def classes_first(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return class outputs as (N, C, ...). Outputs (N, ..., C) are accepted if only this order fits the targets.

    Raises:
        ValueError: the outputs do not have one value per class for each target.
    """
    if outputs.dim() == targets.dim() + 1 and outputs.dim() > 1:
        if outputs.shape[:1] + outputs.shape[2:] == targets.shape:
            return outputs
        if outputs.shape[:-1] == targets.shape:
            return outputs.movedim(-1, 1)
    shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
    raise ValueError(f"expected outputs (N, classes, ...) and targets (N, ...), found {shapes}")


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return a quotient in high precision; NaN for 0 / 0."""
    return high_precision(numerator) / high_precision(denominator)

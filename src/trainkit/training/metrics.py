"""Metrics: exact running means, correct predictions, and the learning rates and gradients of an epoch's last step."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.ranks import Ranks
from trainkit.core.shards import whole
from trainkit.losses import FromModel

Metrics = dict[str, Any]
# Metrics, and entries of checkpoints, that differ between equal runs.
CLOCKS = ("seconds", "samples_per_second", "tokens_per_second", "earlier_seconds")


class Mean:
    """The weighted mean of batch values.

    On an accelerator the sums are float64 tensors (float32 on Apple GPUs), and only `item` and `sum` synchronize
    the device. On the CPU the sums are Python floats. Nothing is filtered: a NaN value makes the mean NaN.

    Args:
        device: the device of the values.
        summed: the values are sums over their batches, which are added without a weight.
    """

    numerator: Any  # a float on the CPU, a scalar tensor elsewhere
    denominator: Any

    def __init__(self, device: torch.device, *, summed: bool = False) -> None:
        self.device, self.summed = device, summed
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.has_values = False  # whether a value was added, by any rank
        self.set_sums(0.0, 0.0)

    def update(self, value: Tensor, weight: Tensor | float) -> None:
        """Add a batch's scalar `value`, a mean over `weight` (samples, or the loss's denominator)."""
        self.has_values = True
        if self.device.type == "cpu":
            number, count = value.item(), weight.item() if isinstance(weight, Tensor) else weight
            self.numerator += number if self.summed else number * count if count else 0.0
            self.denominator += count
            return
        if self.summed:
            self.numerator += value.detach().to(self.dtype)
        else:
            product = value.detach().to(self.dtype) * weight
            # A mean over nothing is 0 / 0 and adds nothing to the sum.
            self.numerator += torch.where(weight == 0, 0.0, product) if isinstance(weight, Tensor) else product
        self.denominator += weight

    def set_sums(self, numerator: Tensor | float, denominator: Tensor | float) -> None:
        """Replace both sums."""
        if self.device.type == "cpu":
            self.numerator, self.denominator = float(numerator), float(denominator)
        else:
            self.numerator = torch.as_tensor(numerator).to(self.device, self.dtype, copy=True)
            self.denominator = torch.as_tensor(denominator).to(self.device, self.dtype, copy=True)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the numerator and the denominator, two scalar tensors."""
        return torch.as_tensor(self.numerator, dtype=self.dtype), torch.as_tensor(self.denominator, dtype=self.dtype)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks."""
        if ranks.are_several:
            self.set_sums(*ranks.sum(torch.stack(self.sums())))
            self.has_values = any(row[0] for row in ranks.agree(self.has_values))

    def sum(self) -> float:
        """Return the sum of value times weight."""
        return float(self.numerator)

    def item(self) -> float:
        """Return the weighted mean; NaN if no value was added."""
        numerator, denominator = self.sums()
        return float((numerator / denominator).item())


def count_correct(
    loss_fn: nn.Module, outputs: Any, targets: Any, classes: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return the number of correct predictions and the number of predictions; None if the loss has no classes.

    The prediction of class outputs (N, C, ...) is the largest output; ignored targets do not count. The prediction
    of a binary cross entropy is whether the probability is over 0.5. A custom loss has classes if the model has an
    output for each class.

    Args:
        loss_fn: the loss.
        outputs: the outputs of the model.
        targets: the targets of the batch.
        classes: the number of classes in the data; None: unknown.
    """
    if isinstance(loss_fn, FromModel):
        outputs, targets = loss_fn.class_outputs(outputs, targets)
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if isinstance(loss_fn, nn.BCEWithLogitsLoss | nn.BCELoss):
        boundary = 0.0 if isinstance(loss_fn, nn.BCEWithLogitsLoss) else 0.5
        correct = (outputs > boundary) == (targets > 0.5)
        return correct.sum(), torch.ones_like(correct).sum()
    if targets.is_floating_point():
        if not isinstance(loss_fn, nn.CrossEntropyLoss) or outputs.shape != targets.shape or outputs.dim() < 2:
            return None
        targets = targets.argmax(dim=1)
    if outputs.dim() != targets.dim() + 1 or outputs.dim() < 2 or outputs.shape[1] < 2:
        return None
    is_custom = not isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss | nn.MultiMarginLoss)
    if is_custom and classes is not None and outputs.shape[1] != classes:  # such as one output per threshold
        return None
    counted = targets != getattr(loss_fn, "ignore_index", -100)
    return ((outputs.argmax(dim=1) == targets) & counted).sum(), counted.sum()


def scalar_or_norm(tensor: Tensor | None) -> float | None:
    """Return the value of a tensor with one element, or the norm of a larger tensor."""
    if tensor is None:
        return None
    tensor = whole(tensor)
    return float(tensor.item() if tensor.numel() == 1 and not tensor.is_complex() else tensor.norm().item())


def plain_metric(value: Any) -> Any:
    """Return a metric as JSON stores it: scalars of torch and NumPy become Python numbers.

    Raises:
        TypeError: JSON cannot store the value.
        ValueError: the value contains itself.
    """
    if hasattr(value, "item") and getattr(value, "size", None) is not None and getattr(value, "ndim", 1) == 0:
        value = value.item()
    json.dumps(value)
    return value

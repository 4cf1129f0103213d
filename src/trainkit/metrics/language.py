"""Metrics of predicted tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit.metrics.base import Metric, classes_first, high_precision, predictions_in


class TokenLoss(Metric):
    """The mean negative log-likelihood of the tokens.

    Args:
        ignore_index: targets with this value do not count.
        shifted: the outputs at a position predict the target at the next position, as in causal language models of
            Hugging Face.
    """

    higher_is_better: ClassVar[bool | None] = False

    def __init__(self, *, ignore_index: int = -100, shifted: bool = False) -> None:
        super().__init__()
        self.ignore_index, self.shifted = ignore_index, shifted

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch of logits and tokens."""
        outputs = classes_first(predictions_in(outputs), targets)
        if self.shifted:
            outputs, targets = outputs[..., :-1], targets[:, 1:]
        losses = F.cross_entropy(outputs, targets, ignore_index=self.ignore_index, reduction="none")
        self.add("loss", high_precision(losses).sum())
        self.add("count", (targets != self.ignore_index).sum())

    def mean(self) -> float:
        """Return the mean; NaN without tokens."""
        if not self.sums:
            return math.nan
        return float(self.sums["loss"].cpu() / torch.as_tensor(self.sums["count"]).cpu())


class Perplexity(TokenLoss):
    """The exponential of the mean negative log-likelihood of a token."""

    def compute(self) -> float:
        """Return the perplexity; infinity if it is too large for a float."""
        try:
            return math.exp(self.mean())
        except OverflowError:
            return math.inf


class BitsPerToken(TokenLoss):
    """The mean negative log-likelihood of a token in bits; bits per character if the tokens are characters."""

    def compute(self) -> float:
        """Return the bits."""
        return self.mean() / math.log(2)

"""Losses that configs name, besides those of torch."""

from __future__ import annotations

from torch import Tensor, nn


class Identity(nn.Module):
    """A loss for models whose output is the loss itself: the mean of the output, whatever its shape."""

    def forward(self, outputs: Tensor, targets: object) -> Tensor:  # noqa: ARG002
        """Return the mean of `outputs`; `targets` are ignored."""
        return outputs.mean()

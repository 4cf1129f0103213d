"""The models: any `torch.nn.Module`."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Two hidden layers and a head.

    Shape: (N, 2) to (N, num_classes).

    Args:
        width: number of features in the hidden layers.
        num_classes: number of outputs.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """Return the logits of each class."""
        logits: Tensor = self.head(self.body(points))
        return logits

"""A classifier with a backbone that can start from saved weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_backbone() -> nn.Sequential:
    """Return a small CNN: a stem and three stages. Each stage halves the height and width of its images.

    Shape: (N, 3, 32, 32) to (N, 64, 2, 2).
    """
    backbone = nn.Sequential()
    backbone.add_module("stem", nn.Sequential(nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1), nn.ReLU()))
    for number, (before, after) in enumerate([(16, 32), (32, 64), (64, 64)], start=1):
        convolution = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
        backbone.add_module(f"stage{number}", nn.Sequential(convolution, nn.ReLU()))
    return backbone


class Classifier(nn.Module):
    """A backbone and a linear head.

    Shape: (N, 3, 32, 32) to (N, num_classes).

    Args:
        num_classes: number of outputs of the head. The head always starts from random weights.
        weights: a file with the `state_dict` of the backbone. None: the backbone starts from random weights.

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: the file does not match the backbone.
    """

    def __init__(self, num_classes: int, weights: str | None = None) -> None:
        super().__init__()
        self.backbone = make_backbone()
        self.head = nn.Linear(64 * 2 * 2, num_classes)
        if weights is not None:
            self.backbone.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each class."""
        logits: Tensor = self.head(self.backbone(images).flatten(1))
        return logits

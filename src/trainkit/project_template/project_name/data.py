"""The data sets: anything with `__len__` and `__getitem__(index) -> (inputs, target)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Rings(Dataset[tuple[Tensor, Tensor]]):
    """Random points on three rings around the origin. The ring is the class.

    trainkit takes the number of classes from the attribute `classes`.

    Shape: inputs (2,) float32, targets () int64.

    Args:
        size: number of points.
        noise: standard deviation of the distance between a point and its ring.
        seed: seed of the points; the same seed gives the same points.
    """

    classes = ("inner", "middle", "outer")

    def __init__(self, size: int, noise: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(size) % len(self.classes)
        radius = 1 + self.targets + noise * torch.randn(size, generator=generator)
        angle = 2 * math.pi * torch.rand(size, generator=generator)
        self.points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a point and its ring."""
        return self.points[index], self.targets[index]

"""A custom data set: points on the arms of a spiral."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Spirals(Dataset[tuple[Tensor, Tensor]]):
    """Points in the plane, each on one arm of a spiral. The arm is the class.

    trainkit needs `__len__` and `__getitem__`, and takes the number of classes from the attribute `classes`.

    Shape: inputs (2,) float32, targets () int64.

    Args:
        size: number of points.
        arms: number of arms, which are the classes.
        noise: standard deviation of the noise that is added to each coordinate.
        seed: seed of the points; the same seed gives the same points.
    """

    def __init__(self, size: int = 600, arms: int = 3, noise: float = 0.02, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes = list(range(arms))
        self.targets = torch.arange(size) % arms
        radius = torch.rand(size, generator=generator).sqrt()
        angle = 2 * math.pi * (self.targets / arms + radius)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        self.points = points + noise * torch.randn(size, 2, generator=generator)

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a point and its arm."""
        return self.points[index], self.targets[index]

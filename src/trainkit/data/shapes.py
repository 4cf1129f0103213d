"""Generated images of circles, squares and triangles with the class of each pixel, for segmentation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def shapes(size: int = 600, pixels: int = 64, shapes: int = 3, noise: float = 0.25, seed: int = 0) -> TensorDataset:
    """Return images with circles, squares and triangles of random colors, places and sizes over noise.

    Args:
        size: the number of images.
        pixels: the height and the width of an image.
        shapes: the number of shapes in an image. A later shape covers an earlier one.
        noise: the standard deviation of the noise, for values from 0 to 1.
        seed: the seed of the images.

    Shape: images (size, 3, pixels, pixels) uint8; classes (size, pixels, pixels) int64: 0 background, 1 circle,
    2 square, 3 triangle.
    """
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(pixels), torch.arange(pixels), indexing="ij")
    images = torch.rand(size, 3, 1, 1, generator=generator).expand(-1, -1, pixels, pixels) * 0.3
    classes = torch.zeros(size, pixels, pixels, dtype=torch.int64)
    for _ in range(shapes):
        kind = torch.randint(1, 4, (size, 1, 1), generator=generator)
        center = (torch.rand(size, 2, generator=generator) * pixels)[:, :, None, None]
        radius = (pixels * (0.1 + 0.15 * torch.rand(size, generator=generator)))[:, None, None]
        color = 0.3 + 0.7 * torch.rand(size, 3, 1, 1, generator=generator)
        inside = inside_shape(kind, x - center[:, 0], y - center[:, 1], radius)
        images = torch.where(inside[:, None], color, images)
        classes = torch.where(inside, kind, classes)
    images = images + noise * torch.randn(images.shape, generator=generator)
    return TensorDataset((images.clamp(0, 1) * 255).round().to(torch.uint8), classes)


def inside_shape(kind: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Return which pixels, (N, H, W) bool, are inside a shape, by their distances from its center."""
    circle = dx**2 + dy**2 <= radius**2
    square = (dx.abs() <= radius) & (dy.abs() <= radius)
    triangle = (dy <= radius) & (dy >= 2 * dx.abs() - radius)
    return torch.where(kind == 1, circle, torch.where(kind == 2, square, triangle))

"""Generated images of circles, squares and triangles with the box and the class of each shape, for detection."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from trainkit.data.shapes import inside_shape

CELLS = 2  # in each direction; each cell of an image holds at most one shape


def boxes(size: int = 600, pixels: int = 64, share: float = 0.6, noise: float = 0.1, seed: int = 0) -> TensorDataset:
    """Return images with up to four shapes of random colors, places and sizes over noise.

    Args:
        size: the number of images.
        pixels: the height and the width of an image.
        share: the probability that a quarter of an image holds a shape.
        noise: the standard deviation of the noise, for values from 0 to 1.
        seed: the seed of the images.

    Shape: images (size, 3, pixels, pixels) uint8; boxes (size, 4, 4) as x1, y1, x2, y2; classes (size, 4) int64: 0 no
    shape, 1 circle, 2 square, 3 triangle.
    """
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(pixels), torch.arange(pixels), indexing="ij")
    images = torch.rand(size, 3, 1, 1, generator=generator).expand(-1, -1, pixels, pixels) * 0.3
    cell, found, classes = pixels / CELLS, [], []
    for place in range(CELLS**2):
        present = torch.rand(size, generator=generator) < share
        kind = torch.randint(1, 4, (size,), generator=generator) * present
        radius = cell * (0.2 + 0.25 * torch.rand(size, generator=generator))
        corner = torch.tensor([place % CELLS, place // CELLS]) * cell
        center = corner + radius[:, None] + torch.rand(size, 2, generator=generator) * (cell - 2 * radius)[:, None]
        color = 0.4 + 0.6 * torch.rand(size, 3, 1, 1, generator=generator)
        dx, dy = (axis + 0.5 - center[:, i, None, None] for i, axis in enumerate((x, y)))
        inside = inside_shape(kind[:, None, None], dx, dy, radius[:, None, None]) & present[:, None, None]
        images = torch.where(inside[:, None], color, images)
        found.append(torch.cat([center - radius[:, None], center + radius[:, None]], 1))
        classes.append(kind)
    images = images + noise * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return TensorDataset(images, torch.stack(found, 1), torch.stack(classes, 1))

"""Decode image files, the same for a training and for predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainkit.core.atomic import open_regular_file

MODE = "RGB"  # of the images of a folder
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> mode


def read_image(path: str, mode: str = MODE) -> Any:
    """Return an image as PIL decodes it, converted to a mode. Opening a pipe or a device would wait or read forever.

    Raises:
        OSError: the file is missing, truncated, or not an image.
    """
    from PIL import Image

    with open_regular_file(Path(path), follow_links=True) as file:
        return Image.open(file).convert(mode)


def fit_image(size: int | Sequence[int] | None) -> Callable[[Any], Any] | None:
    """Return a function that resizes and crops an image; None: images stay unchanged.

    Args:
        size: a number of pixels: the shorter side gets this length, and the center square is cropped. A height and a
            width: the image is cropped to their ratio, and resized. None: unchanged.
    """
    if size is None:
        return None
    if isinstance(size, int):
        return functools.partial(crop_to_square, side=size)
    from PIL import Image, ImageOps

    height, width = size
    return lambda image: ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def crop_to_square(image: Any, side: int) -> Any:
    """Return an image whose shorter side is resized (bilinear) to `side` pixels, cropped to the square in its center.

    The pixels equal those of torchvision's `Resize` and `CenterCrop`.
    """
    from PIL import Image

    width, height = image.size
    if min(width, height) != side:
        long = side * max(width, height) // min(width, height)
        width, height = (side, long) if width <= height else (long, side)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))

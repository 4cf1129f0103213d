"""Decode image files, the same for a training and for predictions."""

from __future__ import annotations

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
        from torchvision.transforms import v2

        resize: Callable[[Any], Any] = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
        return resize
    from PIL import Image, ImageOps

    height, width = size
    return lambda image: ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)

"""A folder of images, listed and decoded without torchvision, whose import takes longer than many trainings."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from trainkit.core.errors import DataError
from trainkit.data.images import MODE, fit_image, read_image

# The extensions that `torchvision.datasets.ImageFolder` reads.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageFolder:
    """The images of a folder with one folder per class, in the order of `torchvision.datasets.ImageFolder`.

    Args:
        root: the folder.
        classes: the names of the classes; a class may have no folder here.
        size: see `fit_image`.

    Attributes:
        samples: for each image its path and the number of its class.
        targets: the numbers of the classes.
        reader: how a prediction reads an image.
        cache_as: a name for the decoded images, and a text that changes when any image changes.

    Raises:
        DataError: there is no image, or a class that has a folder here has none.
    """

    def __init__(self, root: Path, classes: list[str], size: int | None) -> None:
        self.root, self.classes = str(root), classes
        self.class_to_idx = {name: number for number, name in enumerate(classes)}
        self.samples = [
            (path, self.class_to_idx[name])
            for name in sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            for path in images_of_class(root / name)
        ]
        self.targets = [target for _, target in self.samples]
        self.reader = {"kind": "images", "mode": MODE, "size": size}
        self.cache_as = _cache_key(self, size)
        self._fit = fit_image(size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a PIL image and the number of its class."""
        path, target = self.samples[index]
        image = read_image(path)
        return image if self._fit is None else self._fit(image), target


def images_of_class(folder: Path) -> list[str]:
    """Return the paths of the images in the folder of a class and in the folders below it.

    Raises:
        DataError: there is no image.
    """
    paths = [
        os.path.join(place, name)  # noqa: PTH118  # a Path for each of a million images takes seconds
        for place, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS)
    ]
    if not paths:
        cause = f"{folder.parent}: the folder {folder.name} has no image ({', '.join(EXTENSIONS)})"
        raise DataError(cause, hint="remove the folder, or put images into it: CLASS/NAME.jpg")
    return paths


def class_folders(folder: Path) -> list[str]:
    """Return the names of the classes: the folders in a folder, in the order of their names.

    Raises:
        DataError: there is no folder.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        hint = "arrange the images as CLASS/NAME.jpg, in train/ and val/ or directly in the folder"
        raise DataError(f"{folder}: it has no folder, and each class needs one", hint=hint)
    return classes


def image_folder(root: str, part: str = "train", size: int | str | None = None) -> ImageFolder | None:
    """Return the images in `root/train`, in `root/val` (or `root/test`), or directly in `root`.

    Shape: images (3, size, size) uint8.

    Args:
        root: a folder with one folder of images per class, or with such folders for each part.
        part: train or val.
        size: images are resized so that the shorter side has so many pixels, then cropped to a square.
            None or "off" keeps the images unchanged.

    Returns:
        The images. None if `part` is val and the folder has no validation part.

    Raises:
        DataError: the folder is missing or has no images, or the parts have different classes.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"data.root={root}: this folder does not exist", hint="name it with data.root=FOLDER")
    train = top / "train" if (top / "train").is_dir() else top
    folder = train if part == "train" else _validation_folder(top)
    if folder is None:
        return None
    classes = class_folders(train)  # the training folder numbers the classes, and may have more of them
    unknown = set(class_folders(folder)) - set(classes)
    if unknown:
        cause = f"{folder}: {train} has no class {', '.join(sorted(unknown))}"
        raise DataError(cause, hint="give both parts the same folders")
    return ImageFolder(folder, classes, int(size) if size and size != "off" else None)


def _validation_folder(top: Path) -> Path | None:
    """Return `val` or `test` in a folder that has a `train`, else None."""
    folders = [top / name for name in ("val", "test") if (top / name).is_dir()]
    return folders[0] if folders and (top / "train").is_dir() else None


def _cache_key(images: ImageFolder, size: int | None) -> tuple[str, str]:
    """Return the value of `ImageFolder.cache_as`."""
    import PIL

    folder = Path(images.root).resolve()
    name = hashlib.sha256(f"{folder} {size}".encode()).hexdigest()[:16]
    listing = hashlib.sha256(f"PIL {PIL.__version__}".encode())
    for file, target in images.samples:
        try:
            facts = Path(file).stat()
            state = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        except OSError:  # such as a link to a missing file: reported when the sample is read
            state = "unreadable"
        seen = f"{os.path.relpath(file, images.root)} {target} {state}\n"
        listing.update(seen.encode(errors="surrogateescape"))
    return f"{folder.name}-{name}", listing.hexdigest()

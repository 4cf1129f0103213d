"""The data sets that configs name, besides those of torchvision; what a set tells of itself; its split."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from array import array
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from trainkit.core.errors import DataError


def digits() -> TensorDataset:
    """The 1,797 digits of the UCI optical recognition of handwritten digits set (its test part).

    E. Alpaydin and C. Kaynak, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0. Its 8x8 images of 17
    levels are upsampled (bilinear) to 32x32 and repeated on 3 channels.

    Shape: images (1797, 3, 32, 32) uint8, targets (1797,) int64.
    """
    with resources.files("trainkit.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        small, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    large = torch.nn.functional.interpolate(small[:, None] * (255 / 16), size=(32, 32), mode="bilinear")
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return TensorDataset(images, labels.long())


def line(x: Sequence[float] = (-2, -1, 0, 1, 2), slope: float = 5.0, intercept: float = 0.0) -> TensorDataset:
    """The points (x, slope * x + intercept). Shape: both (len(x), 1) float32."""
    inputs = torch.tensor(x, dtype=torch.float32).reshape(-1, 1)
    return TensorDataset(inputs, slope * inputs + intercept)


def synthetic(size: int = 1000, shape: Sequence[int] = (3, 32, 32), classes: int = 10, seed: int = 0) -> TensorDataset:
    """Noise over a pattern that belongs to the class, for trying and for measuring.

    Shape: images (size, *shape) uint8, targets (size,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(size) % classes
    patterns = torch.randint(0, 64, (classes, *shape), dtype=torch.uint8, generator=generator)
    images = torch.randint(0, 192, (size, *shape), dtype=torch.uint8, generator=generator)
    for label in range(classes):
        images[label::classes] += patterns[label]
    return TensorDataset(images, targets)


def arrays(file: str, part: str = "train") -> TensorDataset | None:
    """The arrays `X` and `y` of an .npz file, or `X_val` and `y_val` for `part="val"` (None without them).

    uint8 inputs are images, scaled to 0..1 later; other integers stay, floats become float32. Integer
    targets are classes; float targets of shape (N,) become (N, 1), as a model with one output gives.

    Raises:
        DataError: the file is missing or unreadable, or its arrays do not fit each other.
    """
    names = ("X", "y") if part == "train" else ("X_val", "y_val")
    try:
        with np.load(Path(file).expanduser(), allow_pickle=False) as loaded:
            found = sorted(loaded.files)
            if part == "val" and not set(names) & set(found):
                return None
            lacking = [name for name in names if name not in found]
            if lacking:
                raise DataError(f"{file}: it has no array {lacking[0]!r}", hint=f"it has: {', '.join(found)}")
            inputs, targets = (loaded[name] for name in names)
            sizes = len(inputs), len(targets)
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(
            f"data.file={file}: {error}", hint="name an .npz file written by numpy.savez(file, X=..., y=...)"
        ) from error
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{file}: {names[0]} has {sizes[0]} rows and {names[1]} {sizes[1]}",
            hint="each input needs its target: make them equally long",
        )
    y = _standard(targets)
    if y.is_floating_point() and y.dim() == 1:
        y = y[:, None]
    return TensorDataset(_standard(inputs), y.long() if not y.is_floating_point() else y)


def _standard(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor of the type that models take: float32, int64, or uint8 as it is."""
    if array.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind in "iub":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    raise DataError(f"an array of type {array.dtype} is no data to train on", hint="store numbers")


def image_folder(root: str, part: str = "train", size: int | str | None = None) -> Any:
    """The images under `root`: of `root/train`, `root/val` (or `root/test`), or straight of `root`.

    Args:
        root: a folder with a folder of images per class, or with such folders named by part.
        part: train or val.
        size: the shorter side in pixels, then cropped square; None or off leaves the images as they are.

    Returns:
        A `torchvision.datasets.ImageFolder` of uint8 images (3, size, size), or None where `part` is
        val and there is none.

    Raises:
        DataError: there is no such folder, no image in it, or the parts have other classes.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"data.root={root}: there is no such folder", hint="name it with data.root=FOLDER")
    train = top / "train" if (top / "train").is_dir() else top
    folder = train
    if part == "val":
        there = [top / name for name in ("val", "test") if train != top and (top / name).is_dir()]
        if not there:
            return None
        folder = there[0]
    fit = [v2.Resize(size), v2.CenterCrop(size)] if size and size != "off" else []
    try:
        images = ImageFolder(folder, transform=v2.Compose(fit) if fit else None)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: {str(error).splitlines()[0]}",
            hint="lay the images out as CLASS/NAME.jpg, under train/ and val/ or straight in the folder",
        ) from error
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    strange = set(images.classes) - set(classes)
    if strange:
        raise DataError(
            f"{folder}: no class in {train} is called {', '.join(sorted(strange))}",
            hint="give both parts the same folders",
        )
    if images.classes != classes:  # a part may lack a class: the numbers are those of the training part
        number = {name: classes.index(name) for name in images.classes}
        images.samples = [(path, number[images.classes[target]]) for path, target in images.samples]
        images.targets = [target for _, target in images.samples]
        images.classes, images.class_to_idx = classes, {name: i for i, name in enumerate(classes)}
    images.cache_as = _decoded(images, size)
    return images


def _decoded(images: Any, size: int | str | None) -> tuple[str, str]:
    """A name for what the images of a folder are once decoded, and a text that changes when any of them does."""
    import PIL
    import torchvision

    folder = Path(images.root).resolve()
    name = hashlib.sha256(f"{folder} {size}".encode()).hexdigest()[:16]
    listing = hashlib.sha256(f"PIL {PIL.__version__}, torchvision {torchvision.__version__}".encode())
    for file, target in images.samples:
        facts = Path(file).stat()
        times = f"{facts.st_mtime_ns} {facts.st_ctime_ns}"
        seen = f"{os.path.relpath(file, images.root)} {target} {facts.st_size} {times}\n"
        listing.update(seen.encode(errors="surrogateescape"))
    return f"{folder.name}-{name}", listing.hexdigest()


# ------------------------------------------------------------------------------------- what a set is


def targets_of(dataset: Any) -> Tensor | None:
    """The classes of all samples, (N,) int64, where the data set tells without reading them."""
    targets = dataset.tensors[1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    if targets is None:
        return None
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):  # names, boxes: no classes to count
        return None
    return None if targets.is_floating_point() or targets.dim() != 1 else targets


def count_classes(dataset: Any) -> int | None:
    """How many classes a data set has: as it says itself, or by its largest target."""
    if hasattr(dataset, "classes"):
        return len(dataset.classes)
    targets = targets_of(dataset)
    return None if targets is None or not len(targets) else int(targets.max()) + 1


def split(dataset: Any, fraction: float, source: Any = None) -> tuple[Any, Any]:
    """Hold out `fraction` of a data set, the same share of each class where it has classes.

    Which samples are held out depends on the data set alone, not on the run's seed: runs with other
    seeds are judged on the same samples. Of one whose samples are those of `source`, held in memory,
    that is what tells of the classes.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    targets = targets_of(dataset if source is None else source)
    place = torch.empty(len(dataset), dtype=torch.float64)  # of a sample within its class, from 0 to 1
    for label in [None] if targets is None else targets.unique():
        members = order if targets is None else order[targets[order] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    held_out = torch.zeros(len(dataset), dtype=torch.bool)
    held_out[order[place[order].argsort(stable=True)[: round(fraction * len(dataset))]]] = True
    return _subset(dataset, ~held_out), _subset(dataset, held_out)


def _subset(dataset: Any, mask: Tensor) -> Subset[Any]:
    return Subset(dataset, array("q", mask.nonzero().flatten().numpy()))  # 8 bytes a sample, where a list takes 40

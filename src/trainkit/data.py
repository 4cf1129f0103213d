"""Data sets, their split, and loaders that start at any batch of any epoch.

A data set has a length and gives `(inputs, target)` for an index. Images travel as uint8 and become
floats from 0 to 1 on the device (`Prepare`); one whose samples lie in tensors (`TensorDataset`) is
sliced, every other streams through torch's `DataLoader`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from trainkit.errors import DataError

Batch = tuple[Any, Any]


class Loader(Protocol):
    """What the loop knows of data."""

    samples: int

    def __len__(self) -> int:
        """How many batches an epoch has."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """`(inputs, targets)` on the device, of epoch `epoch` (from 0) from batch `start` on."""


# ---------------------------------------------------------------------------------------- data sets


def digits() -> TensorDataset:
    """The 1,797 digits of the UCI optical recognition of handwritten digits set (its test part).

    E. Alpaydin and C. Kaynak, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0. Its 8x8 images of 17
    levels are upsampled (bilinear) to 32x32 and repeated on 3 channels.

    Shape: images (1797, 3, 32, 32) uint8, targets (1797,) int64.
    """
    with resources.files("trainkit").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
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
                raise DataError(f"{file}: it has no array {lacking[0]!r}", mend=f"it has: {', '.join(found)}")
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
            f"data.file={file}: {error}", mend="name an .npz file written by numpy.savez(file, X=..., y=...)"
        ) from error
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{file}: {names[0]} has {sizes[0]} rows and {names[1]} {sizes[1]}",
            mend="each input needs its target: make them equally long",
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
    raise DataError(f"an array of type {array.dtype} is no data to train on", mend="store numbers")


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
        raise DataError(f"data.root={root}: there is no such folder", mend="name it with data.root=FOLDER")
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
            mend="lay the images out as CLASS/NAME.jpg, under train/ and val/ or straight in the folder",
        ) from error
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    strange = set(images.classes) - set(classes)
    if strange:
        raise DataError(
            f"{folder}: no class in {train} is called {', '.join(sorted(strange))}",
            mend="give both parts the same folders",
        )
    if images.classes != classes:  # a part may lack a class: the numbers are those of the training part
        number = {name: classes.index(name) for name in images.classes}
        images.samples = [(path, number[images.classes[target]]) for path, target in images.samples]
        images.targets = [target for _, target in images.samples]
        images.classes, images.class_to_idx = classes, {name: i for i, name in enumerate(classes)}
    return images


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


def split(dataset: Any, fraction: float) -> tuple[Any, Any]:
    """Hold out `fraction` of a data set, the same share of each class where it has classes.

    Which samples are held out depends on the data set alone, not on the run's seed: runs with other
    seeds are judged on the same samples.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    targets = targets_of(dataset)
    place = torch.empty(len(dataset), dtype=torch.float64)  # of a sample within its class, from 0 to 1
    for label in [None] if targets is None else sorted(set(targets.tolist())):
        members = order if targets is None else order[targets[order] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    held_out = torch.zeros(len(dataset), dtype=torch.bool)
    held_out[order[place[order].argsort(stable=True)[: round(fraction * len(dataset))]]] = True
    return _subset(dataset, ~held_out), _subset(dataset, held_out)


def in_tensors(dataset: Any) -> bool:
    """Whether a data set's samples are slices of its tensors (a subclass may do more to them)."""
    return getattr(type(dataset), "__getitem__", None) is TensorDataset.__getitem__


def _subset(dataset: Any, mask: Tensor) -> Any:
    if in_tensors(dataset):
        return TensorDataset(*(tensor[mask] for tensor in dataset.tensors))
    return Subset(dataset, mask.nonzero().flatten().tolist())


# ------------------------------------------------------------------------------------------- loaders


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation (samples,) int64 made from (seed, epoch) alone."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(2)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(int(state[0])))


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with every tensor in it changed: a tensor, or tuples, lists and mappings of them."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def batch_size_of(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor.

    Raises:
        DataError: there is no tensor in it.
    """
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor) if tensor.dim() else 1)
        return tensor

    map_tensors(batch, note)
    if not sizes:
        raise DataError(f"the inputs are {type(batch).__name__}, with no tensor in them", mend="give tensors")
    return sizes[0]


@dataclass(frozen=True)
class Prepare:
    """The last step of a batch's way: onto the device, uint8 to floats from 0 to 1, normalised.

    Args:
        device: where the batch goes.
        mean: subtracted from the inputs: one number, or one a channel (dimension 1).
        std: what they are divided by then.
    """

    device: torch.device
    mean: Tensor | None = None
    std: Tensor | None = None

    def __call__(self, inputs: Any, targets: Any) -> Batch:
        """The batch as the model takes it."""
        return map_tensors(inputs, self._input), map_tensors(targets, self._move)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _input(self, tensor: Tensor) -> Tensor:
        tensor = self._move(tensor)
        if tensor.dtype == torch.uint8:
            tensor = tensor.to(torch.get_default_dtype()).div_(255)
        if self.mean is not None and self.std is not None:
            shape = (-1, *[1] * (tensor.dim() - 2))
            tensor = (tensor - self.mean.view(shape)) / self.std.view(shape)
        return tensor


@dataclass
class Order:
    """The indices of each batch of an epoch, for `DataLoader`; the loader sets epoch and start."""

    samples: int
    batch_size: int
    limit: int | None
    seed: int | None
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        count = -(-self.samples // self.batch_size)
        return count if self.limit is None else min(count, self.limit)

    def __iter__(self) -> Iterator[list[int]]:
        return (indices.tolist() for indices in self.batches())

    def batches(self) -> Iterator[Tensor]:
        """The indices of each batch from `start` on, (batch_size,) int64."""
        if self.seed is None:
            order = torch.arange(self.samples)
        else:
            order = epoch_order(self.samples, self.seed, self.epoch)
        for batch in range(self.start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class SlicingLoader:
    """Batches sliced out of tensors in memory."""

    def __init__(self, dataset: TensorDataset, order: Order, prepare: Prepare) -> None:
        self.tensors, self.order, self.prepare = dataset.tensors, order, prepare
        self.samples = min(order.samples, len(order) * order.batch_size)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        self.order.epoch, self.order.start = epoch, start
        for indices in self.order.batches():
            inputs, targets = (tensor[indices] for tensor in self.tensors)
            yield self.prepare(inputs, targets)


class StreamingLoader:
    """Batches read sample by sample through torch's `DataLoader`, in worker processes if asked for."""

    def __init__(self, dataset: Dataset[Any], order: Order, prepare: Prepare, num_workers: int = 0) -> None:
        self.order, self.prepare = order, prepare
        self.samples = min(order.samples, len(order) * order.batch_size)
        self.generator = torch.Generator()
        self.loader = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=prepare.device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=self.generator,  # its own: reading data must not move the model's random numbers
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        self.order.epoch, self.order.start = epoch, start
        self.generator.manual_seed(int(np.random.SeedSequence([self.order.seed or 0, epoch]).generate_state(1)[0]))
        for inputs, targets in self.loader:
            yield self.prepare(inputs, targets)


def collate(samples: list[Any]) -> Any:
    """Samples to a batch, as torch does it; images of PIL become uint8 tensors (C, H, W).

    Raises:
        DataError: a sample is no pair.
    """
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(
                f"a sample of the data set is {type(sample).__name__}, not a pair (inputs, target)",
                mend="let its __getitem__ return inputs, target",
            )
    return default_collate([tuple(_as_tensor(part) for part in sample) for sample in samples])


def _as_tensor(part: Any) -> Any:
    if hasattr(part, "getbands"):  # an image of PIL, which need not be imported to ask
        pixels = torch.from_numpy(np.array(part))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return part


def make_loader(
    dataset: Any,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int | None,
    num_workers: int = 0,
    limit_batches: int | None = None,
) -> Loader:
    """The loader that suits a data set.

    Args:
        dataset: a `TensorDataset` is sliced; anything else with a length and items streams.
        prepare: brings a batch onto the device.
        batch_size: samples of a batch; the last may be shorter.
        seed: of the order; None keeps the data set's own.
        num_workers: processes that read samples.
        limit_batches: most batches of an epoch.
    """
    order = Order(len(dataset), batch_size, limit_batches, seed)
    if in_tensors(dataset) and len(dataset.tensors) == 2:
        return SlicingLoader(dataset, order, prepare)
    return StreamingLoader(dataset, order, prepare, num_workers)

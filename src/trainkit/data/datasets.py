"""The data sets that configs name as `trainkit.data.NAME`, besides those of torchvision."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from trainkit.core.errors import DataError


def digits(keep: Sequence[int] | None = None) -> TensorDataset:
    """Return the 1,797 digits of the test part of the UCI set "Optical Recognition of Handwritten Digits".

    Source: E. Alpaydin and C. Kaynak, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0. The 8x8 images with 17
    levels are upsampled (bilinear) to 32x32 and repeated on 3 channels.

    Shape: images (1797, 3, 32, 32) uint8, targets (1797,) int64.

    Args:
        keep: the digits to keep, which become the classes 0, 1, ...; None: all.
    """
    with resources.files("trainkit.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        small, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    large = torch.nn.functional.interpolate(small[:, None] * (255 / 16), size=(32, 32), mode="bilinear")
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    if keep is None:
        return TensorDataset(images, labels.long())
    is_class = labels[:, None] == torch.tensor(keep)
    kept = is_class.any(1)
    return TensorDataset(images[kept], is_class[kept].long().argmax(1))


def line(x: Sequence[float] = (-2, -1, 0, 1, 2), slope: float = 5.0, intercept: float = 0.0) -> TensorDataset:
    """Return the points (x, slope * x + intercept). Shape: inputs and targets (len(x), 1) float32."""
    inputs = torch.tensor(x, dtype=torch.float32).reshape(-1, 1)
    return TensorDataset(inputs, slope * inputs + intercept)


def synthetic(size: int = 1000, shape: Sequence[int] = (3, 32, 32), classes: int = 10, seed: int = 0) -> TensorDataset:
    """Return random images: noise over a pattern of their class, for trials and benchmarks.

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
    """Return the arrays `X` and `y` of an .npz file, or for `part="val"` its `X_val` and `y_val`.

    uint8 inputs stay uint8; the loader scales them as images to 0..1. Other integers become int64, and floats
    become float32. Integer targets are class numbers. Float targets of shape (N,) become (N, 1), the shape of
    the output of a model with one output value.

    Returns:
        The samples. None if the file has no arrays for `part="val"`.

    Raises:
        DataError: the file is missing or unreadable, or its arrays differ in length.
    """
    names = ("X", "y") if part == "train" else ("X_val", "y_val")
    path = Path(file).expanduser()
    if path.exists() and not path.is_file():
        raise DataError(f"data.file={file}: this is not a regular file", hint="set data.file to an .npz file")
    try:
        with np.load(path, allow_pickle=False) as loaded:
            found = sorted(loaded.files)
            if part == "val" and not set(names) & set(found):
                return None
            lacking = [name for name in names if name not in found]
            if lacking and path.suffix in (".npz", ""):
                raise DataError(f"{file}: it has no array {lacking[0]!r}", hint=f"it has: {', '.join(found)}")
            inputs, targets = (loaded[name] for name in names)
            sizes = len(inputs), len(targets)
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if path.is_file() and path.suffix not in (".npz", ""):
            raise _not_npz_error(file) from error
        raise DataError(
            f"data.file={file}: {error}",
            hint="set data.file to an .npz file written by numpy.savez(file, X=..., y=...)",
        ) from error
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{file}: {names[0]} has {sizes[0]} rows, but {names[1]} has {sizes[1]}",
            hint="each input needs its target: make them equally long",
        )
    y = _as_model_dtype(targets)
    if y.is_floating_point() and y.dim() == 1:
        y = y[:, None]
    return TensorDataset(_as_model_dtype(inputs), y if y.is_floating_point() else y.long())


def _not_npz_error(file: str) -> DataError:
    """Return the error for a file of another format, with the lines that convert the file."""
    suffix, npz = Path(file).suffix, Path(file).with_suffix(".npz")
    table = [f'numpy.savez("{npz}", X=table[:, :-1], y=table[:, -1])  # class numbers: y=table[:, -1].astype(int)']
    delimiter = r"\t" if suffix == ".tsv" else ","
    csv = [f'table = numpy.genfromtxt("{file}", delimiter="{delimiter}", skip_header=1)', *table]
    lines = {
        ".csv": csv,
        ".tsv": csv,
        ".txt": csv,
        ".npy": [f'numpy.savez("{npz}", X=numpy.load("{file}"), y=targets)'],
        ".pt": [
            f'loaded = torch.load("{file}")',
            f'numpy.savez("{npz}", X=loaded["X"].numpy(), y=loaded["y"].numpy())',
        ],
        ".parquet": [f'table = pandas.read_parquet("{file}").to_numpy()', *table],
    }.get(suffix, [f'numpy.savez("{npz}", X=inputs, y=targets)'])
    hint = "\n    ".join(["convert it in Python, and name the new file with data.file:", *lines])
    return DataError(f"data.file={file}: data=arrays reads .npz files, and this is a {suffix} file", hint=hint)


def _as_model_dtype(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array as a tensor with a dtype that models accept: float32, int64 or uint8."""
    if array.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind in "iub":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    raise DataError(f"an array of dtype {array.dtype} cannot be trained on", hint="store numbers")

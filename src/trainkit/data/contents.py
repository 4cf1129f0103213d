"""Facts about a data set that change if its samples change. A checkpoint keeps them, and a resume compares them."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.core.pytree import map_tensors
from trainkit.data.flow import FlowingLoader
from trainkit.data.loaders import Loader, SlicingLoader, take_rows
from trainkit.data.pairs import Pair, tensors_in_pair
from trainkit.data.reading import file_of
from trainkit.data.stream_loader import StreamLoader

MAX_ROWS = 64  # samples in memory whose values are compared
MAX_VALUES = 2**19  # numbers in these samples; at least one sample is compared
MAX_FILES = 256  # files whose names and sizes are compared
TOLERANCE = 2e-3  # relative: another CPU or another version of a library may round values differently


def data_facts(loader: Loader, name: str) -> dict[str, Any]:
    """Return facts about the data set of a loader; their keys begin with `name`.

    Moving the files or touching them changes no fact. Streamed samples are not compared, because they may be random.
    """
    if isinstance(loader, StreamLoader):
        return loader.facts(name)
    loader = loader.loader if isinstance(loader, FlowingLoader) else loader
    count = len(loader.dataset)
    # A limit of the batches is a config key, so it is not a fact about the set.
    facts: dict[str, Any] = {"samples" if count == loader.samples else "set": count}
    files = [file_of(loader.dataset, index) for index in _choose(count, MAX_FILES)]
    if all(file is not None for file in files):
        facts["files"] = _digest_of_files([str(file) for file in files])
    with suppress(Exception):  # the training reports what is wrong with the samples
        facts |= _sample_facts(loader, count, compare_values="files" not in facts)
    return {f"{name} {key}": value for key, value in facts.items()}


def _sample_facts(loader: Loader, count: int, *, compare_values: bool) -> dict[str, Any]:
    """Return facts about samples in memory. Reading a streamed sample may have side effects, so none is read."""
    if isinstance(loader, SlicingLoader):
        pair = _held_rows(loader, count)
        checksums = [checksum for tensor in tensors_in_pair(pair) for checksum in _checksums(tensor)]
        return {"structure": _describe(pair)} | ({"contents": checksums} if compare_values else {})
    return {}


def differing_facts(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the facts that differ, each with both values. A fact that only one side has is not compared."""
    different = {}
    for key in [key for key in saved if key in current]:
        old, new = saved[key], current[key]
        if isinstance(old, list) and isinstance(new, list):
            limit = TOLERANCE * max(map(abs, [*old, *new]), default=0.0)
            pairs = [(a, b) for a, b in zip(old, new, strict=False) if abs(a - b) > limit]
            if pairs:
                different[key] = (f"checksum {pairs[0][0]:.6g}", f"checksum {pairs[0][1]:.6g}")
        elif old != new:
            different[key] = (old, new)
    return different


def _choose(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices, the same for each data set of this length."""
    if count <= limit:
        return list(range(count))
    generator = random.Random(0)
    return sorted({int(generator.random() * count) for _ in range(limit)})


def _digest_of_files(files: Sequence[str]) -> str:
    """Return a digest of the names, relative to their common folder, and the sizes of files."""
    folder = os.path.commonpath([Path(file).absolute().parent for file in files]) if files else ""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            size = Path(file).stat().st_size
        except (OSError, ValueError):  # such as a link to a missing file
            size = -1
        digest.update(f"{os.path.relpath(Path(file).absolute(), folder)} {size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _held_rows(loader: SlicingLoader, count: int) -> Pair:
    """Return some samples of a data set in memory, on the CPU."""
    values = sum(tensor[:1].numel() for tensor in tensors_in_pair(loader.tensors))
    chosen = torch.tensor(_choose(count, max(1, min(MAX_ROWS, MAX_VALUES // max(1, values)))), device=loader.device)
    inputs, targets = take_rows(loader.tensors, chosen if loader.rows is None else loader.rows[chosen])
    return map_tensors(inputs, Tensor.cpu), map_tensors(targets, Tensor.cpu)


def _checksums(tensor: Tensor) -> list[float]:
    """Return a weighted sum of the values of each row. Different rounding of the values changes the sum a little."""
    rows = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    rows = rows.reshape(len(rows), -1).to(torch.float64).nan_to_num(posinf=1.0, neginf=-1.0)
    weights = (torch.arange(1, rows.shape[1] + 1) * 2654435761 % 2**32).to(torch.float64) / 2**32 - 0.5
    return [float(value) for value in rows @ weights]


def _describe(pair: Pair) -> str:
    """Return the dtypes and the numbers of dimensions of the samples of a batch."""

    def of_tensor(tensor: Tensor) -> Any:
        return f"{tensor.dtype} {tensor.dim() - 1}-d"

    parts = [map_tensors(part, of_tensor) for part in pair]
    return ", ".join(str(part).replace("torch.", "").replace("'", "") for part in parts)

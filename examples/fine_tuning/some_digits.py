"""Two tasks from one data set: some of the ten digits each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import TensorDataset

from trainkit.data import digits


def some_digits(labels: Sequence[int]) -> TensorDataset:
    """Return the digits with these labels. The class of a digit is the position of its label in `labels`.

    Shape: images (N, 3, 32, 32) uint8, targets (N,) int64.
    """
    images, targets = digits().tensors
    kept = torch.isin(targets, torch.tensor(labels))
    classes = torch.tensor([list(labels).index(int(label)) for label in targets[kept]])
    return TensorDataset(images[kept], classes)

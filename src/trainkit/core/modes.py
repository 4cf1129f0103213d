"""Training mode and evaluation mode of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Set modules and their children to evaluation mode for the block, and turn off gradients in it."""
    training = [child for module in modules for child in module.modules() if child.training]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in training:
            child.training = True

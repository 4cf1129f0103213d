"""Several optimizers that act as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


class ChainedOptimizer:
    """Several optimizers that zero and step as one; each parameter is in one of them."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.optimizers = dict(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, in the order of the optimizers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the first."""
        return next(iter(self.optimizers.values())).defaults

    def zero_grad(self) -> None:
        """Let go of every gradient."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def step(self) -> None:
        """Let each update its own parameters."""
        for optimizer in self.optimizers.values():
            optimizer.step()

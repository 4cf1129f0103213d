"""Several optimizers that are used as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


class ChainedOptimizer:
    """Optimizers that zero gradients and step together. Each parameter belongs to one of them."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.optimizers = dict(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of all optimizers, in order."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the first optimizer."""
        return next(iter(self.optimizers.values())).defaults

    def zero_grad(self) -> None:
        """Reset the gradients of all parameters."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def step(self) -> None:
        """Step every optimizer."""
        for optimizer in self.optimizers.values():
            optimizer.step()

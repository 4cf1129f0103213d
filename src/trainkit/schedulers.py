"""Schedulers over param groups: a rate that is given once keeps the groups' ratios."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler, ReduceLROnPlateau

Scheduler = LRScheduler | ReduceLROnPlateau
PER_GROUP = ("max_lr", "base_lr", "min_lr", "swa_lr")  # torch takes one number, or a list with one for each group


def ratios(optimizer: Optimizer) -> list[float]:
    """Each param group's learning rate over the optimizer's own."""
    lr = float(optimizer.defaults.get("lr") or 0)
    return [float(group["lr"]) / lr if lr else 1.0 for group in optimizer.param_groups]


def keeping_ratios(cls: Any, arguments: dict[str, Any], optimizer: Optimizer) -> tuple[Any, dict[str, Any]]:
    """A scheduler's class and arguments such that no rate among them is the same for unequal groups.

    torch takes `max_lr`, `base_lr` and `min_lr` as they are for all groups, and `eta_min` as the one
    floor of all. Here the number is meant for a group at the optimizer's own learning rate, and the
    others have it in proportion. Lists stay as they are.
    """
    scale = ratios(optimizer)
    if len(set(scale)) < 2:
        return cls, arguments
    arguments = dict(arguments)
    for name in PER_GROUP:
        if isinstance(arguments.get(name), int | float):
            arguments[name] = [arguments[name] * ratio for ratio in scale]
    if cls in (CosineAnnealingLR, CosineAnnealingWarmRestarts) and arguments.get("eta_min"):
        floors = [arguments["eta_min"] * ratio for ratio in scale]
        cls = type(cls.__name__, (_FloorByGroup, cls), {"floors": floors})
    return cls, arguments


class _FloorByGroup:
    """Torch's own formula, evaluated for each group with that group's floor."""

    floors: list[float]
    eta_min: float

    def get_lr(self) -> list[Any]:
        rates = []
        for number, floor in enumerate(self.floors):
            self.eta_min = floor
            rates.append(super().get_lr()[number])  # type: ignore[misc]  # of the class it is mixed into
        return rates

"""Schedulers over param groups: a rate that is given once keeps the groups' ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler, ReduceLROnPlateau

from trainkit.core.errors import ConfigError

Scheduler = LRScheduler | ReduceLROnPlateau
PER_GROUP = ("max_lr", "base_lr", "min_lr", "swa_lr")  # torch takes one number, or a list with one for each group
ONE_FLOOR = (CosineAnnealingLR, CosineAnnealingWarmRestarts)  # whose eta_min torch takes for all groups


def keep_group_ratios(cls: Any, arguments: dict[str, Any], ratios: Sequence[float]) -> tuple[Any, dict[str, Any]]:
    """A scheduler's class and arguments such that no rate among them is the same for unequal groups.

    torch takes `max_lr`, `base_lr` and `min_lr` as they are for all groups, and `eta_min` as the one
    floor of all. Here the number is meant for a group of ratio 1, and the others have it in
    proportion. Lists stay as they are.

    Args:
        cls: the scheduler's class.
        arguments: what it is called with, the optimizer aside.
        ratios: each param group's learning rate over the one that the numbers are meant for.

    Raises:
        ConfigError: a list of floors that does not fit the groups.
    """
    if all(ratio == 1 for ratio in ratios):
        return cls, arguments
    arguments = dict(arguments)
    for name in PER_GROUP:
        if isinstance(arguments.get(name), int | float):
            arguments[name] = [arguments[name] * ratio for ratio in ratios]
    floor = arguments.get("eta_min")
    if isinstance(cls, type) and issubclass(cls, ONE_FLOOR) and floor:
        floors = floor if isinstance(floor, list) else [floor * ratio for ratio in ratios]
        if len(floors) != len(ratios):
            raise ConfigError(f"eta_min={floors}: there are {len(ratios)} param groups", hint="give one for each")
        arguments["eta_min"] = floors[0]
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

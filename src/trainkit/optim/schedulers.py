"""Schedulers that keep the ratios of learning rates between param groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler, ReduceLROnPlateau

from trainkit.core.errors import ConfigError

Scheduler = LRScheduler | ReduceLROnPlateau
# Arguments for which torch accepts a number, or a list with one number per param group.
PER_GROUP_ARGUMENTS = ("max_lr", "base_lr", "min_lr", "swa_lr")
# Schedulers that have one eta_min for all param groups.
ONE_ETA_MIN = (CosineAnnealingLR, CosineAnnealingWarmRestarts)


def keep_group_ratios(cls: Any, arguments: dict[str, Any], ratios: Sequence[float]) -> tuple[Any, dict[str, Any]]:
    """Give each param group its own rates in a scheduler's arguments, so that the groups keep their ratios.

    torch applies `max_lr`, `base_lr`, `min_lr` and `eta_min` to all groups alike. This function multiplies such a
    number by the ratio of each group. Lists stay unchanged.

    Args:
        cls: the class of the scheduler.
        arguments: its arguments without the optimizer.
        ratios: for each param group, its learning rate divided by the base learning rate.

    Returns:
        The class and the arguments to use.

    Raises:
        ConfigError: the length of a list for `eta_min` is not the number of groups.
    """
    if all(ratio == 1 for ratio in ratios):
        return cls, arguments
    arguments = dict(arguments)
    for name in PER_GROUP_ARGUMENTS:
        if isinstance(arguments.get(name), int | float):
            arguments[name] = [arguments[name] * ratio for ratio in ratios]
    eta_min = arguments.get("eta_min")
    if isinstance(cls, type) and issubclass(cls, ONE_ETA_MIN) and eta_min:
        values = eta_min if isinstance(eta_min, list) else [eta_min * ratio for ratio in ratios]
        if len(values) != len(ratios):
            cause = f"eta_min={values}: the list must have one value for each of the {len(ratios)} param groups"
            raise ConfigError(
                cause, hint="write one number, which is scaled for each group, or a list with one value per group"
            )
        arguments["eta_min"] = values[0]  # the class accepts one value; the subclass uses all of them
        cls = type(cls.__name__, (_EtaMinPerGroup, cls), {"eta_min_per_group": values})
    return cls, arguments


class _EtaMinPerGroup:
    """A mixin that evaluates torch's formula for each group with the group's own `eta_min`."""

    eta_min_per_group: list[float]
    eta_min: float

    def get_lr(self) -> list[Any]:
        rates = []
        for group, eta_min in enumerate(self.eta_min_per_group):
            self.eta_min = eta_min  # compute all rates with this value, and keep the rate of its group
            rates.append(super().get_lr()[group])  # type: ignore[misc]  # of the class that follows the mixin
        return rates

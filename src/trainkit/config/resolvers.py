"""Interpolations of trainkit.

`${total_steps:}` and `${steps_per_epoch:}` are known once the data is known. `${without_folds:0.2}` is the default of
`data.split`, which gives way to `data.folds`.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

NAMES = ("total_steps", "steps_per_epoch", "without_folds")
STEPS_PER_EPOCH = "_steps_per_epoch_"  # the root key that `set_steps_per_epoch` adds


def set_steps_per_epoch(config: DictConfig, steps_per_epoch: int) -> None:
    """Set the number of optimizer steps of an epoch, in place."""
    OmegaConf.update(config, STEPS_PER_EPOCH, steps_per_epoch, force_add=True)


def _total_steps(until: float = 1, *more: float, _parent_: Any, _root_: Any) -> int | None:
    """Return how often the surrounding scheduler steps in the run, or in a share of the run.

    `${total_steps:0.1}` is the first tenth, `${total_steps:0.1,1}` is the rest.
    """
    start, end = (until, *more) if more else (0, until)
    if not all(isinstance(share, int | float) for share in (start, end)) or not 0 <= start < end <= 1:
        raise ValueError("give shares of the run, from 0 to 1: ${total_steps:0.1} or ${total_steps:0.1,1}")
    total = _steps_in_run(_parent_, _root_)
    if total is None:
        return None
    first, last = (share and max(1, round(share * total)) for share in (start, end))  # a share has at least 1 step
    return max(1, int(last - first))


def _steps_per_epoch(epochs: float = 1, *, _parent_: Any, _root_: Any) -> int | None:
    """Return how often the surrounding scheduler steps in a number of epochs."""
    in_epoch = _steps_in_epoch(_parent_, _root_)
    return None if in_epoch is None else max(1, round(epochs * in_epoch))


def _steps_in_run(node: Any, root: Any) -> int | None:
    """Return how often the surrounding scheduler steps in the run; None if its length or the data is unknown."""
    in_epoch, epochs, steps = _steps_in_epoch(node, root), root.get("epochs"), root.get("steps")
    if in_epoch is None or type(steps) is not int:
        return epochs * in_epoch if in_epoch is not None and type(epochs) is int else None
    updates: int | None = root.get(STEPS_PER_EPOCH)
    return None if updates is None else -(-steps * in_epoch // updates)  # the last epoch may be short


def _steps_in_epoch(node: Any, root: Any) -> int | None:
    """Return 1 inside a scheduler that steps every epoch, else the optimizer steps of an epoch if they are set."""
    inside = str(node._get_full_key(None)).partition(".")[0].partition("[")[0] == "scheduler"
    while inside and node is not None:
        interval = node.get("interval") if isinstance(node, DictConfig) else None
        if interval is not None or node._get_parent() is root:
            return 1 if interval in (None, "epoch") else root.get(STEPS_PER_EPOCH)
        node = node._get_parent()
    steps: int | None = root.get(STEPS_PER_EPOCH)
    return steps


def _without_folds(value: Any, *, _root_: Any) -> Any:
    """Return the value, or None if `data.folds` is on."""
    data = _root_.get("data")
    folds = data.get("folds") if isinstance(data, DictConfig) else None
    return value if folds in (None, False, "off") else None


OmegaConf.register_new_resolver("without_folds", _without_folds, replace=True)
OmegaConf.register_new_resolver("total_steps", _total_steps, replace=True)
OmegaConf.register_new_resolver("steps_per_epoch", _steps_per_epoch, replace=True)

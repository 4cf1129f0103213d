"""The table of parameters: the group of each parameter, its options, and the rule that decided each option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainkit.optim.groups import Group, effective_options
from trainkit.optim.params import Param
from trainkit.optim.rules import OptimizerOptions


def param_table(
    params: list[Param], groups: list[Group], optimizers: Mapping[str, OptimizerOptions]
) -> list[dict[str, Any]]:
    """Return a row for each parameter with its group, effective options and the rule that decided each option.

    A tied parameter has one row, with its further names in `aliases`. `count` is the number of elements.
    `options` maps the name of each option to its value, and `freeze` to the epochs before the parameter is trained.
    `decided_by` maps it to the name of a rule or to `default`. The group and the optimizer of a frozen parameter
    are None.
    """
    group_of = {id(param.tensor): (group, param) for group in groups for param in group.params}
    rows: dict[int, dict[str, Any]] = {}
    for param in params:
        if id(param.tensor) in rows:
            rows[id(param.tensor)]["aliases"].append(param.name)
            continue
        group, grouped = group_of.get(id(param.tensor), (None, param))
        options = effective_options(grouped, optimizers) if group else {}
        options |= {"freeze": grouped.frozen_epochs} if group and grouped.frozen_epochs else {}
        rows[id(param.tensor)] = {
            "name": param.name,
            "aliases": [],
            "shape": list(param.tensor.shape),
            "count": param.tensor.numel(),
            "layer": param.layer,
            "group": group and group.name,
            "optimizer": group and group.optimizer,
            "options": options,
            "decided_by": (
                _rules_by_option(grouped, options, several_optimizers=len(optimizers) > 1)
                if group
                else {"freeze": param.decided_by.get("freeze", "default")}
            ),
            "trainable": group is not None,
        }
    return list(rows.values())


def _rules_by_option(param: Param, options: Mapping[str, Any], *, several_optimizers: bool) -> dict[str, str]:
    """Return, for each option in force, the rule that set it.

    If there are several optimizers, this includes the rule that chose the optimizer.
    """
    decided_by = {name: param.decided_by.get(name, "default") for name in options}
    if "lr_mult" in param.decided_by:  # the rate in force is lr * lr_mult, so both rules decided it
        rules = [param.decided_by[key] for key in ("lr", "lr_mult") if key in param.decided_by]
        decided_by["lr"] = "+".join(dict.fromkeys(rules))
    if several_optimizers:
        decided_by["optimizer"] = param.decided_by.get("optimizer", "default")
    return decided_by

"""Show each parameter with its group, its options and the rule that set each option; train nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.cli import arguments
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json, columns, count, option_value, shown_options


def run(argv: Sequence[str]) -> int:
    """Build the model and the optimizer, and print the parameters (weights) of the model."""
    args, composed = arguments.parse_for_one_config(argv, json=False)
    from trainkit.build import session as build

    with arguments.only_answer_on_stdout(args):
        params = build.build_session(composed.settings).params
    print(as_json(params) if args.json else printable_lines(parameter_table(params)))
    return 0


def parameter_table(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table with a line for each parameter.

    Args:
        params: the rows of the parameter table, from `Session.params`.
    """
    names = shown_options(params)
    rows = [["parameter", "shape", "parameters", "layer", "group", "optimizer", *names]]
    for row in params:
        label = " = ".join([row["name"], *row["aliases"]])
        shape = "x".join(map(str, row["shape"])) or "()"
        cells = [_option_cell(row, name) for name in names]
        rows.append(
            [label, shape, f"{row['count']:,}", str(row["layer"]), _group(row), row["optimizer"] or "-", *cells]
        )
    size = sum(row["count"] for row in params)
    trainable = sum(row["count"] for row in params if row["trainable"])
    total = f"{count(len(params), 'tensor')}, {count(size, 'parameter')}, {trainable:,} of them trainable"
    return [*columns(rows), total, "(RULE) set the value; other values are the optimizer's defaults"]


def _option_cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["options"]:
        return "-"
    rule, value = row["decided_by"].get(name, "default"), option_value(row["options"][name])
    return value if rule == "default" else f"{value} ({rule})"


def _group(row: Mapping[str, Any]) -> str:
    rule = row["decided_by"].get("freeze", "default")
    return row["group"] or ("frozen" if rule == "default" else f"frozen ({rule})")

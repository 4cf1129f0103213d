"""Show one training step in detail: each gradient before and after backward, the update, and zero_grad."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from trainkit.cli import arguments
from trainkit.core.errors import NonFiniteError
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json, columns, count, number

COLUMNS = {  # of the table; the keys are those of `inspect_step`
    "weight": "weight",
    "grad_before": "grad before",
    "grad": "after backward",
    "grad_twice": "after a second",
    "grad_after_zero": "after zero_grad",
    "update": "update",
    "relative_update": "update/weight",
    "weight_after": "weight after",
}


def run(argv: Sequence[str]) -> int:
    """Do the first step of a training and print its values."""
    args, composed = arguments.parse_for_one_config(argv, json=False)
    from trainkit.build import session as build
    from trainkit.diagnostics.inspect import inspect_step
    from trainkit.engine.error_context import explained_errors
    from trainkit.engine.warm_start import prepare_warm_start

    with arguments.only_answer_on_stdout(args):
        settings, warm_start = prepare_warm_start(composed.settings)
        session = build.build_session(settings, initialize=warm_start)
        with closing(session), explained_errors(session):
            step = inspect_step(session)
    print(as_json(step) if args.json else printable_lines(step_table(step)))
    if not math.isfinite(step["loss"]):
        raise NonFiniteError(f"the loss is {step['loss']}", hint="look for NaN in the data and the weights")
    return 0


def step_table(step: Mapping[str, Any]) -> list[str]:
    """Return a table with a line for each parameter, followed by notes.

    Args:
        step: what `inspect_step` returns.
    """
    rows = step["parameters"]
    shown = dict(COLUMNS)
    if any(row["finite_difference"] is not None for row in rows):
        shown["finite_difference"] = "finite difference"
    cells = [["parameter", *shown.values()]]
    for row in rows:
        values = (row[key] for key in shown)
        cells.append([row["name"], *("none" if value is None else number(value) for value in values)])
    notes = [f"loss {number(step['loss'])} of a batch of {count(step['samples'], 'sample')}"]
    notes.append("a tensor of one element is shown by its value, other tensors by their norm")
    notes.append("gradients add up until zero_grad")
    for epochs in sorted({row["frozen_epochs"] for row in rows} - {0}):
        names = ", ".join(row["name"] for row in rows if row["frozen_epochs"] == epochs)
        notes.append(f"note: frozen in the first {count(epochs, 'epoch')}: {names}")
    trained = [row for row in rows if row["group"] is not None and not row["frozen_epochs"]]
    unused = [row["name"] for row in trained if row["grad"] is None]
    if unused:
        notes.append(f"note: the loss does not depend on {', '.join(unused)}")
    return [*columns(cells), *notes]

"""One step taken apart: each gradient before backward, after it, after a second one; the update; zero_grad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing

from trainkit.cli import arguments
from trainkit.core.errors import NonFiniteError
from trainkit.display import text as tables


def run(argv: Sequence[str]) -> int:
    """Take the first step of a training apart, and show it: as a table, or with `--json` as an object."""
    args, composed = arguments.parse_for_one_config(argv, json=False)
    from trainkit.build import session as build
    from trainkit.diagnostics.inspect import inspect_step
    from trainkit.engine.error_context import explained_errors

    with arguments.only_answer_on_stdout(args):
        session = build.build_session(composed.settings)
        with closing(session), explained_errors(session):
            step = inspect_step(session)
    print(tables.as_json(step) if args.json else "\n".join(tables.inspection(step)))
    if not math.isfinite(step["loss"]):
        raise NonFiniteError(f"the loss is {step['loss']}", hint="look for NaN in the data and the weights")
    return 0

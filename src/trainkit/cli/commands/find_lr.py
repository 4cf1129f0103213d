"""A learning-rate range test: the loss as the rate rises, a suggestion, the curve as a picture."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.paths import claim_directory, storage_error
from trainkit.display import live as display
from trainkit.display import text as tables


def run(argv: Sequence[str]) -> int:
    """Train some steps at rising rates, without a scheduler; write the curve into a folder of its own."""
    args, composed = arguments.parse_for_one_config(argv, json=False, start=1e-7, end=10.0, steps=100)
    if not (0 < args.start < args.end < float("inf")) or not 10 <= args.steps <= 100_000:
        cause = f"no range: from {args.start:g} to {args.end:g} in {args.steps} steps"
        raise ConfigError(cause, hint="write --start above 0 and below --end, and --steps from 10 up")
    from trainkit.build import session as build
    from trainkit.diagnostics.lr_finder import range_test
    from trainkit.display import plots as report
    from trainkit.engine.error_context import explained_errors

    settings = replace(composed.settings, scheduler={}, ema=None)
    now = datetime.datetime.now()
    given = composed.directory
    with arguments.only_answer_on_stdout(args):
        session = build.build_session(settings)
        directory = claim_directory(
            given or Path("outputs/find-lr") / f"{now:%Y-%m-%d/%H-%M-%S}", exact=given is not None
        )
        screen = display.make_display(settings.progress)
        with closing(session), explained_errors(session), screen:
            test = range_test(session.state, session.train, settings.lr, args.start, args.end, args.steps, [screen])
    found = {**test.found(), "picture": str(directory / "find_lr.png")}
    try:
        (directory / "find_lr.json").write_text(tables.as_json(found), encoding="utf-8")
        report.lr_curve(directory / "find_lr.png", found)
    except OSError as error:
        raise storage_error(directory, error) from error
    print(tables.as_json(found) if args.json else "\n".join(tables.lr_found(found)))
    return 0

"""Where a step's time goes, how far from the loop by hand and from the machine's limit it is, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.display import live as display
from trainkit.display import text as tables


def run(argv: Sequence[str]) -> int:
    """Time some steps of a training, and of the same loop by hand; trains nothing that is kept."""
    args, composed = arguments.parse_for_one_config(argv, json=False, steps=50)
    if not 1 <= args.steps <= 100_000:
        raise ConfigError(f"--steps {args.steps}: how many are timed", hint="write --steps 50")
    from trainkit.build import session as build
    from trainkit.diagnostics.bench import bench
    from trainkit.engine.error_context import explained_errors

    settings = replace(composed.settings, scheduler={}, on_nonfinite="stop")  # its steps are no epoch of the run's
    with arguments.only_answer_on_stdout(args):
        with display.ReadingProgress(settings.progress) as on_progress:
            session = build.build_session(settings, on_progress)
        with closing(session), explained_errors(session):
            found = bench(session, settings, args.steps)
    print(tables.as_json(found) if args.json else "\n".join(tables.benched(found, session.notes)))
    return 0

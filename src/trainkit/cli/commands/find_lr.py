"""Run a learning-rate range test: raise the learning rate step by step, suggest a value, plot the curve."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainkit.cli import arguments
from trainkit.config.compose import Composed
from trainkit.core.errors import ConfigError
from trainkit.core.paths import claim_directory, storage_error
from trainkit.core.redaction import redact_command_line
from trainkit.core.terminal import printable_lines
from trainkit.display.live import make_display
from trainkit.display.text import as_json, columns, count
from trainkit.runs.secrets import secrets_of


def run(argv: Sequence[str]) -> int:
    """Train some steps while the learning rate rises; write the curve of the loss into a new directory.

    The suggested learning rate is where the loss falls fastest. The scheduler and `ema` are off.
    """
    args, composed = arguments.parse_for_one_config(argv, json=False, start=1e-7, end=10.0, steps=100)
    if not (0 < args.start < args.end < float("inf")) or not 10 <= args.steps <= 100_000:
        cause = f"--start {args.start:g} --end {args.end:g} --steps {args.steps}: these values are not valid"
        raise ConfigError(cause, hint="--start must be greater than 0 and less than --end, --steps from 10 to 100000")
    from trainkit.build import session as build
    from trainkit.diagnostics.lr_finder import range_test
    from trainkit.display.plots import plot_lr_curve
    from trainkit.engine.error_context import explained_errors
    from trainkit.engine.warm_start import prepare_warm_start

    settings = replace(composed.settings, scheduler={}, ema=None)
    given = composed.directory
    default = Path("outputs/find-lr") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"
    with arguments.only_answer_on_stdout(args):
        settings, warm_start = prepare_warm_start(settings)
        session = build.build_session(settings, initialize=warm_start)
        directory = claim_directory(given or default, exact=given is not None)
        display = make_display(settings.progress)
        with closing(session), explained_errors(session), display:
            test = range_test(session.state, session.train, settings.lr, args.start, args.end, args.steps, [display])
    result = {**test.result(), "picture": str(directory / "find_lr.png")}
    try:
        (directory / "find_lr.json").write_text(as_json(result), encoding="utf-8")
        plot_lr_curve(directory / "find_lr.png", result)
    except OSError as error:
        raise storage_error(directory, error) from error
    print(as_json(result) if args.json else printable_lines([*result_lines(result), *search_lines(result, composed)]))
    return 0


def search_lines(result: Mapping[str, Any], composed: Composed) -> list[str]:
    """Return the command of a search around the suggestion; [] if there is none, or the config has no `lr`."""
    best = result["suggestion"]
    if best is None or composed.settings.lr is None:
        return []
    given = [text for text in composed.overrides if not text.startswith(("lr=", "hydra."))]
    given = redact_command_line(given, secrets_of(composed.settings.source))
    values = f"lr=tag(log,interval({best / 10:.1g},{best * 10:.1g}))"
    return [f"to search around it: {shlex.join(['trainkit', '-m', *given, values, 'search.trials=20'])}"]


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the range that was tried, the path of the plot and the suggestion.

    Args:
        result: what `RangeTest.result` returns, with `picture`, the path of the plot.
    """
    rates, groups, suggestion = result["rates"], result["groups"], result["suggestion"]
    tried = "the loss is not finite at any learning rate"
    if rates:
        tried = f"tried {count(len(rates), 'learning rate')} from {rates[0]:.2g} to {rates[-1]:.2g}"
        tried += ", then the loss diverged" if result["diverged"] else ""
    lines = [tried, f"curve: {result['picture']}"]
    if suggestion is None:
        hint = "try another --start and --end, or more --steps"
        return [*lines, f"no suggestion: the loss does not clearly decrease; {hint}"]
    if len(groups) > 1:
        lines += columns([[f"lr/{name}", f"{rate:.2g}"] for name, rate in groups.items()])
    return [*lines, f"the loss decreases fastest at lr={suggestion:.2g}"]

"""Measure where the time of a training step goes, compare it with a loop by hand, and say what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.terminal import printable_lines
from trainkit.display.live import ReadingProgress
from trainkit.display.text import as_json, columns

PHASES = {
    "loader": "read samples and collate them into a batch",
    "transfer": "move to the device, convert to floats, normalise, augment",
    "forward": "model and loss",
    "backward": "gradients",
    "step": "checks, clipping, optimizer, moving average",
}


def run(argv: Sequence[str]) -> int:
    """Time some steps of a training and of the same loop by hand. Nothing that is trained is kept."""
    args, composed = arguments.parse_for_one_config(argv, json=False, steps=50)
    if not 1 <= args.steps <= 100_000:
        raise ConfigError(f"--steps {args.steps}: must be from 1 to 100000", hint="write --steps 50")
    from trainkit.build.session import build_session
    from trainkit.diagnostics.bench import bench
    from trainkit.engine.error_context import explained_errors

    # The timed steps are not the epochs of a run, so a schedule would end too early.
    settings = replace(composed.settings, scheduler={}, steps=None, max_minutes=None, on_nonfinite="stop")
    with arguments.only_answer_on_stdout(args):
        with ReadingProgress(settings.progress) as on_progress:
            session = build_session(settings, on_progress)
        with closing(session), explained_errors(session):
            result = bench(session, settings, args.steps)
    print(as_json(result) if args.json else printable_lines(result_lines(result, session.notes)))
    return 0


def result_lines(result: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    """Return the table of phases, the table of loops and the advice.

    Args:
        result: what `bench` returns.
        notes: the notes of the session.
    """
    lines = [*notes, "", *phase_table(result["phases"]), "", *loop_table(result), ""]
    if result["peak_share"] is not None:
        speed, limit = result["flops"] / result["step"] / 1e9, result["limit"] / 1e9
        share = f"{result['peak_share']:.0%} of the {limit:,.0f} of a large matrix product in this precision"
        lines.append(f"matrix products and convolutions: {speed:,.0f} GFLOP/s, {share}")
    return lines + [f"to change: {text}" for text in result["advice"] or ["nothing stands out"]]


def phase_table(phases: Mapping[str, float]) -> list[str]:
    """Return a table of the phases.

    Args:
        phases: the seconds of each phase.
    """
    total = sum(phases.values())
    rows = [["a step", "ms", "share", ""]]
    rows += [[name, f"{s * 1e3:.2f}", f"{s / total:.0%}", PHASES[name]] for name, s in phases.items()]
    note = "the device is synchronized after each phase, which a training does not do"
    return columns([*rows, ["together", f"{total * 1e3:.2f}", "", note]])


def loop_table(result: Mapping[str, Any]) -> list[str]:
    """Return a table of the loops that were measured.

    Args:
        result: what `bench` returns.
    """
    loops = {
        "by_hand": ("by hand", "a DataLoader without workers, float32, nothing fused, the loss read at each step"),
        "bare": ("bare", "the same objects in five lines; the difference is the cost of trainkit's loop"),
        "step": ("trainkit", f"{result['by_hand'] / result['step']:.2f} times as fast as the loop by hand"),
    }
    rows = [["loop", "ms a step", "samples/s", ""]]
    for key, (name, note) in loops.items():
        seconds = result[key]
        if seconds is not None:
            rows.append([name, f"{seconds * 1e3:.2f}", f"{result['batch_size'] / seconds:,.0f}", note])
    return columns(rows)

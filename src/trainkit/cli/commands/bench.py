"""Measure where the time of a training step goes, compare it with a loop by hand, or try faster settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trainkit.cli import arguments
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.core.machine import processes_to_start
from trainkit.core.rank_variables import is_first_rank
from trainkit.core.terminal import printable, printable_lines
from trainkit.display.live import ReadingProgress
from trainkit.display.text import as_json, columns

if TYPE_CHECKING:
    from trainkit.diagnostics.choices import Choice
    from trainkit.diagnostics.try_settings import Result, Trials

PHASES = {
    "loader": "read samples and collate them into a batch",
    "transfer": "move to the device, convert to floats, normalise, augment",
    "forward": "model and loss",
    "backward": "gradients",
    "step": "checks, clipping, optimizer, moving average",
}


def run(argv: Sequence[str]) -> int:
    """Time some steps of a training and of the same loop by hand. Nothing that is trained is kept.

    With --try, time the training with other settings instead, and say which are faster.
    """
    args, composed = arguments.parse_for_one_config(argv, json=False, steps=50, **{"try": False})
    if not 1 <= args.steps <= 100_000:
        raise ConfigError(f"--steps {args.steps}: must be from 1 to 100000", hint="write --steps 50")
    if getattr(args, "try"):
        return _try(args, composed.settings)
    number = processes_to_start(composed.settings.devices, composed.settings.device)
    if number == 1:
        return _bench(args, composed.settings)
    import trainkit.diagnostics.bench  # noqa: F401  the ranks are forks of this process
    from trainkit.engine.launch import launch

    return launch(number, partial(_bench, args, composed.settings), argv)


def _bench(args: argparse.Namespace, given: Settings) -> int:
    """Time a training in this process, as one of the ranks if there are several, and print the result."""
    from trainkit.build.session import build_session
    from trainkit.build.sharding import check_shardable, shard_session
    from trainkit.core.rank_group import joined_ranks
    from trainkit.diagnostics.bench import bench
    from trainkit.diagnostics.trial import settings_of_timed_steps
    from trainkit.engine.error_context import explained_errors
    from trainkit.engine.train import prepare_rank

    settings = replace(settings_of_timed_steps(given), progress=given.progress)
    with arguments.only_answer_on_stdout(args), joined_ranks() as ranks:
        with ranks.together(), ReadingProgress(settings.progress if ranks.is_first else "off") as on_progress:
            session = build_session(settings, on_progress, ranks=ranks)
            check_shardable(session)
        prepare_rank(session)
        shard_session(session)
        with closing(session), explained_errors(session):
            result = bench(session, settings, args.steps)
    if is_first_rank():
        print(as_json(result) if args.json else printable_lines(result_lines(result, session.notes)))
    return 0


def _try(args: argparse.Namespace, settings: Settings) -> int:
    """Try other settings, each in turn with the present ones; print a table and the fastest."""
    from trainkit.diagnostics.trial import TrialError
    from trainkit.diagnostics.try_settings import try_settings

    def report(choice: Choice) -> None:
        if settings.progress != "off":
            print(printable(f"trying {choice}"), file=sys.stderr, flush=True)

    try:
        trials = try_settings(settings, args.overrides, args.config_dir, report)
    except TrialError as error:
        raise ConfigError(f"bench: the training cannot run: {error}", hint="trainkit check lists all errors") from None
    print(as_json(trials_as_json(trials)) if args.json else printable_lines(trial_lines(trials)))
    return 0


def trial_lines(trials: Trials) -> list[str]:
    """Return the table of the settings that were tried, the fastest first, and the fastest of each kind."""
    rows = [["settings", "samples/s", "times as fast", "memory", "loss differs by"]]
    present, *others = trials.results
    usable = sorted((result for result in others if not result.error), key=lambda r: r.ratio, reverse=True)
    for result in (present, *usable):
        difference = "" if result is present else f"{result.loss_difference:.1e}"
        speed, memory = f"{result.samples_per_second:,.0f}", f"{result.memory / 2**20:,.0f} MiB"
        rows.append([str(result.choice), speed, f"{result.ratio:.2f}", memory, difference])
    lines = columns(rows) + [f"{result.choice}: impossible: {result.error}" for result in others if result.error]
    same = "no other settings with the same mathematics are faster"
    if trials.same is not None:
        same = f"fastest with the same mathematics: {trials.same.choice} ({trials.same.ratio:.2f} times as fast)"
    lower = "no lower precision is faster"
    if trials.lower is not None:
        lower = f"fastest with a lower precision: {trials.lower.choice} ({trials.lower.ratio:.2f} times as fast)"
    return [*lines, "", same, lower]


def trials_as_json(trials: Trials) -> dict[str, Any]:
    """Return the results of `--try` as JSON stores them."""

    def plain(result: Result | None) -> dict[str, Any] | None:
        if result is None:
            return None
        choice = {"overrides": list(result.choice.overrides), "threads": result.choice.threads}
        return choice | {key: value for key, value in vars(result).items() if key != "choice"}

    return {"tried": list(map(plain, trials.results)), "same": plain(trials.same), "lower": plain(trials.lower)}


def result_lines(result: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    """Return the table of phases, the table of loops and the findings.

    Args:
        result: what `bench` returns.
        notes: the notes of the session.
    """
    lines = [*notes, "", *phase_table(result["phases"]), "", *loop_table(result), ""]
    if result["peak_share"] is not None:
        speed, limit = result["flops"] / result["step"] / 1e9, result["limit"] / 1e9
        share = f"{result['peak_share']:.0%} of the {limit:,.0f} of a large matrix product in this precision"
        lines.append(f"matrix products and convolutions: {speed:,.0f} GFLOP/s, {share}")
    return [*lines, *result["findings"], "trainkit bench --try tries other settings, and says which are faster"]


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
        "step": ("trainkit", f"on {result['ranks']} ranks together"),
    }
    if result["by_hand"] is not None:
        loops["step"] = ("trainkit", f"{result['by_hand'] / result['step']:.2f} times as fast as the loop by hand")
    rows = [["loop", "ms a step", "samples/s", ""]]
    for key, (name, note) in loops.items():
        seconds = result[key]
        if seconds is not None:
            rows.append([name, f"{seconds * 1e3:.2f}", f"{result['batch_size'] / seconds:,.0f}", note])
    return columns(rows)

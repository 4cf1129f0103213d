"""Find every error of a config at once, train one batch through the whole path, and estimate time and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.cli import arguments
from trainkit.config.compose import compose_sweep
from trainkit.config.repair import compose_and_repair
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.memory import format_bytes
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json, columns, count, duration

SECONDS = 9.0  # of the measured epochs


def run(argv: Sequence[str]) -> int:
    """Check a config, or with `-m` the jobs of a sweep. Nothing is kept."""
    args = arguments.parse(argv, json=False, seconds=SECONDS)
    if args.cfg or args.info or args.hydra_help or args.shell_completion:
        raise ConfigError("check takes a config, and none of Hydra's flags but -m", hint="remove the flag")
    if not 0 <= args.seconds <= 3600:
        raise ConfigError(f"--seconds {args.seconds}: must be from 0 to 3600", hint="write --seconds 9")
    arguments.report_ignored_configs(args)
    problems, overrides, jobs = _jobs(args) if args.multirun else ([], args.overrides, None)
    repaired = compose_and_repair(overrides, args.config_dir)
    from trainkit.diagnostics.check.run import add_problems, check

    if repaired.composed is not None:
        arguments.print_notes(repaired.composed.notes)
    with arguments.only_answer_on_stdout(args):
        report = check(add_problems(repaired, problems), args.seconds, arguments.print_note)
    content = report.as_dict() | ({} if jobs is None else {"jobs": jobs})
    print(as_json(content) if args.json else printable_lines(report_lines(content)))
    error = report.error()
    if error is not None:
        raise error
    return 0


def _jobs(args: Any) -> tuple[list[Problem], list[str], dict[str, Any]]:
    """Return the problems of the jobs of a sweep, the overrides of the first job, and facts about the sweep.

    Raises:
        ConfigError: a job cannot be composed.
    """
    from trainkit.config.jobs import find_problems_of_jobs
    from trainkit.sweeps.resources import devices_of, measure_capacity

    sweep = compose_sweep(args.overrides, args.config_dir)
    problems = find_problems_of_jobs(job.settings.source for job in sweep.jobs)
    first = sweep.jobs[0]
    search = first.settings.search
    number: int | None = len(sweep.jobs)
    if sweep.space is not None:  # a search, whose number of trials may be open
        number = None if search.trials is None else search.trials * search.seeds
    devices = max(devices_of(job.settings.source) for job in sweep.jobs)
    capacity = measure_capacity("auto", 1, number or len(sweep.jobs), first.settings.device, devices)
    facts = {
        "number": number,
        "more": sweep.more_jobs,
        "slots": capacity.jobs,
        "overrides": list(first.overrides),
    }
    return problems, list(first.overrides), facts


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the phases of the path, the estimates, and the notes.

    Args:
        report: `Report.as_dict`, with `jobs` for a sweep.
    """
    lines = columns([[phase, status] for phase, status in report["phases"].items()])
    estimates, jobs = report["estimates"], report.get("jobs")
    if jobs is not None:
        lines.insert(0, f"the first job of the sweep: {' '.join(jobs['overrides'])}")
    if estimates is not None:
        lines += ["", *estimate_lines(estimates)]
        if jobs is not None and jobs["number"] and estimates["run"] is not None:
            rounds = -(-jobs["number"] // jobs["slots"])
            more = "at least " if jobs["more"] else ""
            text = f"{more}{count(jobs['number'], 'job')}, {jobs['slots']} at a time"
            lines.append(f"sweep   {duration(rounds * estimates['run'])}: {text}, if each takes as long as the first")
    if report["scaling"] is not None:
        lines += ["", *scaling_lines(report["scaling"])]
    lines += report["notes"]
    errors = len(report["errors"])
    return [*lines, "", f"{count(errors, 'error')} found" if errors else "no errors found"]


def estimate_lines(estimates: Mapping[str, Any]) -> list[str]:
    """Return the estimates as a table."""
    reading = f", and {duration(estimates['reading'])} to read the data" if estimates["reading"] >= 0.05 else ""
    epochs = "" if estimates["epochs"] is None else f", {count(estimates['epochs'], 'epoch')}"
    validation = "" if not estimates["validation"] else f", of which {duration(estimates['validation'])} validation"
    run = "unknown: the config sets no end" if estimates["run"] is None else duration(estimates["run"])
    rows = [
        ["time", f"about {run}{epochs}"],
        ["  start", f"{duration(estimates['startup'])}{reading}"],
        ["  epoch", f"{duration(estimates['epoch'])}{validation}"],
        ["memory", f"about {estimates['memory'] / 2**20:,.0f} MiB"],
    ]
    if estimates["checkpoint"]:
        size, kept = estimates["checkpoint"] / 2**20, estimates["checkpoints"] // estimates["checkpoint"]
        rows.append(["disk", f"{size:,.1f} MiB a checkpoint, at most {count(kept, 'checkpoint')} kept"])
    return columns(rows)


def scaling_lines(scaling: Mapping[str, Any]) -> list[str]:
    """Return the estimates for several devices as a table, the speed of the loader, and the notes."""
    links, batch_size = list(scaling["links"]), scaling["batch_size"]
    rows = [["devices", "samples", "compute", "loader", "sent", *(links or ["step"]), "bound by"]]
    for row in scaling["estimates"]:
        steps = [row["over"][link] for link in links] or [row["without_network"]]
        cells = [str(row["devices"]), str(row["samples"]), milliseconds(row["compute"]), milliseconds(row["loader"])]
        cells += [format_bytes(row["sent"]) if row["sent"] else "-"]
        rows.append([*cells, *(milliseconds(step["step"]) for step in steps), _bound(row)])
    title = f"a step with batch_size={batch_size} on several devices takes at least"
    return [f"{title}, over each link:" if links else f"{title}:", *columns(rows), _loader(scaling), *scaling["notes"]]


def _bound(row: Mapping[str, Any]) -> str:
    """Return which part of a step takes longest, and over which links it is the network."""
    slow = [link for link, bound in row["over"].items() if bound["part"] == "network"]
    if slow and len(slow) == len(row["over"]):
        return "network"
    part = row["without_network"]["part"]
    return f"{part}; network over {', '.join(slow)}" if slow else str(part)


def _loader(scaling: Mapping[str, Any]) -> str:
    """Return the speed of the loader, and what the files must deliver."""
    batch_size, costs, last = scaling["batch_size"], scaling["costs"], scaling["estimates"][-1]
    text = f"loader: {batch_size / (costs['loader'] or math.inf):,.0f} samples/s on each device"
    if not costs["read_bytes"]:
        return text if costs["read_bytes"] is None else f"{text}, which read no files"
    rate = batch_size * costs["read_bytes"] / (last["without_network"]["step"] or math.inf)
    read = f"a sample reads {format_bytes(costs['read_bytes'])} of files"
    return f"{text}; {read}, so {last['devices']} devices read up to {format_bytes(rate)} a second"


def milliseconds(seconds: float) -> str:
    """Return seconds in milliseconds with three digits, such as `12.3 ms`."""
    value = seconds * 1000
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"

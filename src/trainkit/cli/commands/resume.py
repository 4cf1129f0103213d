"""Resume a run exactly where it stopped. RUN is the run's directory, or `last`."""

from __future__ import annotations

from collections.abc import Sequence

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.engine.summary import finished_lines, result_lines
from trainkit.runs.directory import Run, find_run
from trainkit.runs.reload import reload_config


def run(argv: Sequence[str]) -> int:
    """Check the overrides, restore the newest intact checkpoint, and continue the training."""
    args = arguments.parse(argv)
    if args.multirun or args.cfg or args.info or args.hydra_help or args.shell_completion or not args.overrides:
        raise ConfigError(
            "resume takes a run and overrides",
            hint="write trainkit resume RUN [KEY=VALUE ...]; RUN is a directory, or last",
        )
    name, *overrides = args.overrides
    before = Run.load(find_run(name))
    if before.info.get("status") == "completed" and not overrides:
        print("\n".join(finished_lines(before)))
        return 0
    reload_config(before, overrides)  # reports a wrong override before the slow import of torch
    from trainkit.engine.resume import resume

    run = resume(before, overrides)
    nothing_done = run.info.get("resumed") == before.info.get("resumed")
    print("\n".join(finished_lines(run) if nothing_done else result_lines(run)))
    return 0

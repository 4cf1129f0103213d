"""Resume a run or a sweep exactly where it stopped. RUN is its directory, or `last`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.imports import fast_imports
from trainkit.core.process import is_first_rank
from trainkit.core.terminal import printable_lines
from trainkit.engine.summary import finished_lines, result_lines
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.recovery import is_finished, recover_run
from trainkit.runs.reload import Reloaded, reload_config
from trainkit.sweeps.ledger import is_sweep


def run(argv: Sequence[str]) -> int:
    """Check the config, restore the newest valid checkpoint, and continue the training."""
    args = arguments.parse(argv, takes_directory=True)
    hint = "write trainkit resume RUN [KEY=VALUE ...], such as trainkit resume last"
    if not args.overrides:
        raise ConfigError("resume needs a run", hint=hint)
    if arguments.has_hydra_flag(args):
        raise ConfigError("resume takes no flag of Hydra", hint=hint)
    name, *overrides = args.overrides  # the first word names the run
    directory = find_run(name)
    if is_sweep(directory):
        from trainkit.sweeps.resume import resume_sweep

        return resume_sweep(directory, overrides)
    before = recover_run(directory)
    if is_finished(before) and not overrides:
        if is_first_rank():
            print(printable_lines(finished_lines(before)))
        return 0
    reloaded = reload_config(before, overrides)  # reports config errors before the slow import of torch
    number = reloaded.processes_to_start()
    if number == 1:
        return _continue(before, reloaded)
    with fast_imports():
        import trainkit.engine.resume  # noqa: F401  the ranks are forks of this process
        from trainkit.engine.launch import launch

    return launch(number, partial(_continue, before, reloaded), argv)


def _continue(before: Run, reloaded: Reloaded) -> int:
    """Continue a run in this process, and print the result."""
    with fast_imports():
        from trainkit.engine.resume import continue_run

    run = continue_run(before, reloaded)
    was_finished = run.info.get("resumed") == before.info.get("resumed")  # each resume adds an entry
    if is_first_rank():
        print(printable_lines(finished_lines(run) if was_finished else result_lines(run)))
    return 0

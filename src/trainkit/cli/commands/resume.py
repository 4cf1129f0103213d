"""Resume a run or a sweep exactly where it stopped. RUN is its directory, or `last`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.imports import fast_imports
from trainkit.core.rank_variables import is_first_rank, number_of_ranks
from trainkit.core.terminal import printable_lines
from trainkit.engine.summary import finished_lines, result_lines
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.reload import Reloaded, read_for_resume
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
    if number_of_ranks() > 1:
        return _resume_on_ranks(name, overrides, argv)
    directory = find_run(name)
    if is_sweep(directory):
        from trainkit.sweeps.resume import resume_sweep

        return resume_sweep(directory, overrides)
    return _resume(*read_for_resume(directory, overrides), argv)


def _resume_on_ranks(name: str, overrides: Sequence[str], argv: Sequence[str]) -> int:
    """Resume a run that rank 0 reads. The other ranks may have no access to its directory."""
    with fast_imports():
        from trainkit.core.rank_group import joined_ranks

    def read() -> tuple[Run, Reloaded | None]:
        directory = find_run(name)
        if is_sweep(directory):
            cause = f"{directory} is a sweep, and torchrun starts a single training"
            raise ConfigError(cause, hint=f"write trainkit resume {name} without torchrun")
        return read_for_resume(directory, overrides)

    with joined_ranks() as ranks:
        return _resume(*ranks.let_first(read), argv)


def _resume(before: Run, reloaded: Reloaded | None, argv: Sequence[str]) -> int:
    """Continue a run, with `devices=N` in processes that this one starts. Without settings, the run is finished."""
    if reloaded is None:
        if is_first_rank():
            print(printable_lines(finished_lines(before)))
        return 0
    number = reloaded.processes_to_start()
    if number == 1:
        return _continue(before, reloaded)
    with fast_imports():
        import trainkit.engine.resume  # noqa: F401  the ranks are forks of this process
        from trainkit.engine.launch import launch

    return launch(number, partial(_continue, before, reloaded), argv)


def _continue(before: Run, reloaded: Reloaded) -> int:
    """Continue a run in this process, and print the result."""
    with fast_imports():  # after the config is checked, because torch imports slowly
        from trainkit.engine.resume import continue_run

    run = continue_run(before, reloaded)
    was_finished = run.info.get("resumed") == before.info.get("resumed")  # each resume adds an entry
    if is_first_rank():
        print(printable_lines(finished_lines(run) if was_finished else result_lines(run)))
    return 0

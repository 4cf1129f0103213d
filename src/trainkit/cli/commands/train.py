"""Train a config; with -m, train every combination of values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from trainkit.cli import arguments
from trainkit.config.compose import Composed, compose_sweep
from trainkit.core.imports import fast_imports
from trainkit.core.machine import processes_to_start, unused_gpus_note
from trainkit.core.rank_variables import is_first_rank
from trainkit.core.terminal import printable_lines


def run(argv: Sequence[str]) -> int:
    """Run a training, a sweep with `-m`, or one of Hydra's flags that only print something."""
    args = arguments.parse(argv)
    arguments.report_ignored_configs(args)
    if arguments.show(args):
        return 0
    if args.multirun:
        from trainkit.sweeps.grid import sweep
        from trainkit.sweeps.pool import start_server_for

        checked = compose_sweep(args.overrides, args.config_dir, on_first_job=start_server_for)
        return sweep(checked, args.overrides, args.config_dir)
    composed = arguments.compose(args)
    settings = composed.settings
    number = processes_to_start(settings.devices, settings.device)
    note = unused_gpus_note(settings.device) if settings.devices == 1 else None
    arguments.print_notes([note] if note else [])
    if number == 1:
        return _train(composed)
    with fast_imports():
        import trainkit.engine.train  # noqa: F401  the ranks are forks of this process
        from trainkit.engine.launch import launch

    return launch(number, partial(_train, composed), argv)


def _train(composed: Composed) -> int:
    """Train in this process, and print the result."""
    with fast_imports():
        from trainkit.engine.summary import result_lines
        from trainkit.engine.train import train

    run = train(composed)
    if is_first_rank():
        print(printable_lines(result_lines(run)))
    return 0

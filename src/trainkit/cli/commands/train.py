"""Train a config; with -m, train every combination of values."""

from __future__ import annotations

from collections.abc import Sequence

from trainkit.cli import arguments
from trainkit.config.compose import compose_sweep
from trainkit.core.imports import fast_imports
from trainkit.core.process import is_first_rank
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
    with fast_imports():
        from trainkit.engine.summary import result_lines
        from trainkit.engine.train import train

    run = train(composed)
    if is_first_rank():
        print(printable_lines(result_lines(run)))
    return 0

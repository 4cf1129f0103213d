"""Compose a config, build what it names, train: one run, or with -m a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from trainkit.cli import arguments
from trainkit.config.compose import compose_sweep


def run(argv: Sequence[str]) -> int:
    """One training, a sweep with `-m`, or one of Hydra's flags that only show something."""
    args = arguments.parse(argv)
    arguments.report_ignored_configs(args)
    if arguments.show(args):
        return 0
    if args.multirun:
        checked = compose_sweep(args.overrides, args.config_dir)
        from trainkit.sweeps.grid import sweep  # imports torch, which a config that is right may wait for

        return sweep(checked, args.overrides, args.config_dir)
    composed = arguments.compose(args)
    from trainkit.engine.summary import result_lines
    from trainkit.engine.train import train

    print("\n".join(result_lines(train(composed))))
    return 0

"""Write report.html and curves.png for PATH: a run, a sweep, or `last`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json
from trainkit.engine.report import CURVES, write_run_report
from trainkit.sweeps.collect import is_run
from trainkit.sweeps.report import write_sweep_report


def run(argv: Sequence[str]) -> int:
    """Write the report into the directory that it is about, and print its path. Imports no torch."""
    args = arguments.parse(argv, takes_directory=True, json=False)
    if arguments.has_hydra_flag(args) or len(args.overrides) != 1:
        hint = "write trainkit report PATH; PATH is the directory of a run or a sweep, or the word last"
        raise ConfigError("report takes one directory, and no flag of Hydra", hint=hint)
    name = args.overrides[0]
    if not name:  # as a path, it would be the working directory
        raise ConfigError("PATH is empty", hint="name the directory of a run or a sweep, or write last")
    directory = Path("outputs/latest").resolve() if name == "last" else Path(name)
    report = write_run_report(directory) if is_run(directory) else write_sweep_report(directory)
    files = {"report": report, "curves": report.with_name(CURVES)}
    shown = {key: display_path(file) for key, file in files.items() if file.exists()}
    print(as_json(shown) if args.json else printable_lines(f"{key}: {path}" for key, path in shown.items()))
    return 0

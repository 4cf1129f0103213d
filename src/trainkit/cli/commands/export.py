"""Export the model of RUN to a file that others can load: ONNX, a program of torch, or safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.imports import fast_imports
from trainkit.core.paths import display_path
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json
from trainkit.runs.find import find_run

HINT = "write trainkit export RUN --format onnx|torch|safetensors; RUN is a directory or the word last"

FLAGS: dict[str, Any] = {
    "format": "",
    "output": "",
    "checkpoint": "best",
    "with_preprocessing": False,
    "overwrite": False,
    "json": False,
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: it names no run or no format, or has a flag of Hydra.
    """
    args = arguments.parse(argv, takes_directory=True, **FLAGS)
    if not args.overrides:
        raise ConfigError("export needs a run", hint=HINT)
    if arguments.has_hydra_flag(args):
        raise ConfigError("export takes no flag of Hydra", hint=HINT)
    if not args.format:
        raise ConfigError("export needs a format", hint=HINT)
    return args


def run(argv: Sequence[str]) -> int:
    """Write the file and its model card; print their paths, and how the file was checked."""
    args = parse(argv)
    name, *overrides = args.overrides  # the first word names the run
    arguments.print_last([name])
    directory = find_run(name)  # before the slow import of torch
    with fast_imports():
        from trainkit.engine.export import export

    with arguments.only_answer_on_stdout(args):
        made = export(
            directory,
            args.format,
            args.output,
            checkpoint=args.checkpoint,
            overrides=overrides,
            with_preprocessing=args.with_preprocessing,
            overwrite=args.overwrite,
        )
    files = {"model": display_path(made.file), "card": display_path(made.card)}
    shown = {**files, "checked": made.checked}
    answer = {**shown, "difference": made.difference}
    print(as_json(answer) if args.json else printable_lines(f"{key}: {text}" for key, text in shown.items()))
    return 0

"""Create a project in DIR: a model, a data set, configs with an experiment, tests, and a schema for editors."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from trainkit.cli.project import create_project
from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.core.terminal import printable_lines

NEXT_COMMANDS = {
    "trainkit experiment=baseline": "train: a few seconds",
    "make setup": "install the dependencies, pytest and ruff",
    "make test": "check the format, lint, and run the tests",
}


def run(argv: Sequence[str]) -> int:
    """Write the files; print their names and the next commands. Imports no torch."""
    if len(argv) != 1 or not argv[0] or argv[0].startswith("-"):
        hint = "write trainkit init DIR; DIR is a new or empty directory, or . for the working directory"
        raise ConfigError("init takes one directory, and no flags", hint=hint)
    directory = Path(os.path.abspath(argv[0]))  # noqa: PTH100  # `resolve` would replace the name of a link
    files = create_project(directory)
    shown = display_path(directory)
    lines = [f"created {shown} with these files:", *(f"  {file}" for file in files), "", "next:"]
    lines += [] if directory == Path.cwd() else [f"  cd {shlex.quote(shown)}"]
    width = max(map(len, NEXT_COMMANDS))
    lines += [f"  {command:<{width}}  # {effect}" for command, effect in NEXT_COMMANDS.items()]
    print(printable_lines([*lines, "", "README.md lists more commands."]))
    return 0

"""Run the command of a command line; turn errors into a message and an exit code."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainkit.core.errors import ConfigError
from trainkit.core.imports import fast_imports
from trainkit.core.process import run_to_exit_code
from trainkit.core.rank_variables import is_first_rank, is_rank, leave_ranks, may_start_processes, number_of_ranks
from trainkit.core.spelling import nearest

COMMANDS = sorted(path.stem.replace("_", "-") for path in (Path(__file__).parent / "commands").glob("[a-z]*.py"))

RANK_COMMANDS = ("train", "resume", "bench")  # that run on all processes of torchrun; the others run on rank 0
FLAGS_THAT_PRINT = {"--help", "-h", "--shell-completion", "-sc", "--version", "--schema"}
FLAGS = ("help", "version", "schema")  # that print something and end


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; see `run_to_exit_code`."""
    if is_rank():  # before the import of torch, whose notes would appear once for each rank
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    words = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(functools.partial(_run, words), words)


def _run(argv: list[str]) -> int:
    # Last, so that `_target_: mymodels.Net` finds ./mymodels.py, but ./random.py does not shadow Python's module.
    sys.path.append(str(Path.cwd()))
    return dispatch(argv)


def _runs_on_ranks(name: str, words: Sequence[str]) -> bool:
    """Return whether each rank of torchrun runs a command; otherwise rank 0 alone runs it.

    Raises:
        ConfigError: the command starts the processes of its trainings itself, so the ranks would not be used.
    """
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    if (name == "train" and given & {"-m", "--multirun"}) or "--try" in given or name == "verify-resume":
        may_start_processes(f"trainkit {name} {' '.join(given & {'-m', '--multirun', '--try'})}".strip())
        return False
    return name in RANK_COMMANDS and not given & {"--cfg", "-c", "--info", "-i", "--hydra-help"}


def dispatch(argv: list[str]) -> int:
    """Run the command that argv names; without a name, run `train`."""
    name, rest = "train", argv
    if argv and argv[0] in COMMANDS:
        name, rest = argv[0], argv[1:]
    elif argv[1:2] and argv[1].startswith("="):  # `epochs = 3`, which the composition reports
        pass
    elif argv and argv[0].replace("-", "").replace("_", "").isalnum() and not argv[0].startswith("-"):
        from trainkit.config.schema import RootKeys

        near = nearest(argv[0], [*COMMANDS, *RootKeys.__annotations__, *FLAGS]) or "train"
        hint = f"did you mean trainkit {near}?" if near in COMMANDS else f"write {near}=VALUE"
        hint = f"write trainkit --{near}" if near in FLAGS else f"{hint}; trainkit --help lists commands and keys"
        raise ConfigError(f"{argv[0]}: neither a command nor KEY=VALUE", hint=hint)
    if FLAGS_THAT_PRINT & set(rest) and not is_first_rank():
        return 0
    if {"--help", "-h"} & set(rest):
        from trainkit.cli.help import command_help, help_text

        print(command_help(name) if argv[0] == name else help_text())
        return 0
    if {"--shell-completion", "-sc"} & set(rest):
        from trainkit.cli import completion

        return completion.run(rest)
    if "--version" in rest:
        from trainkit import __version__

        print(f"trainkit {__version__}")
        return 0
    if "--schema" in rest:
        from trainkit.config.json_schema import json_schema

        print(json.dumps(json_schema(), indent=2))
        return 0
    if number_of_ranks() > 1 and not _runs_on_ranks(name, rest):
        if not is_first_rank():
            return 0
        leave_ranks()
    with fast_imports():
        command = importlib.import_module(f"trainkit.cli.commands.{name.replace('-', '_')}")
    code: int = command.run(rest)
    return code

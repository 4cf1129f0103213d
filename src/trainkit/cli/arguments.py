"""Parse the command line with Hydra's parser, and run the flags that only print something."""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.types import RunMode

from trainkit.config.compose import Composed, Unchecked, compose_run
from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.config.schema import RootKeys
from trainkit.config.search_path import ignored_configs, search_path
from trainkit.config.show import config_text, remove_secrets
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.paths import display_path
from trainkit.core.spelling import nearest
from trainkit.core.terminal import printable

REFUSED = {
    "config_name": "the root config is always trainkit's; choose experiment=NAME",
    "config_path": "put your configs into ./conf, or use --config-dir DIR",
    "experimental_rerun": "the command of a run is in its run.json",
}


def parse(argv: Sequence[str], *, takes_directory: bool = False, **flags: Any) -> argparse.Namespace:
    """Parse a command line. Overrides and flags may come in any order.

    Args:
        argv: without the name of the command.
        takes_directory: whether the command line names a directory.
        flags: the command's flags with their defaults; False for a flag without a value.

    Raises:
        ConfigError: a flag is unknown, or not supported here.
    """

    def fail(message: str) -> NoReturn:
        raise ConfigError(message, hint="trainkit --help lists the flags")

    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    for name, default in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default)
    known = {flag for action in parser._actions for flag in action.option_strings}
    unknown = [word for word in argv if _is_flag(word) and word.partition("=")[0] not in known]
    problems = [_unknown_flag(word, known, takes_directory=takes_directory) for word in unknown]
    if problems:
        raise ConfigError(*problems)
    args = parser.parse_intermixed_args(list(argv))
    for name, hint in REFUSED.items():
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')}: trainkit does not support this flag of Hydra", hint=hint)
    args.multirun |= "hydra.mode=MULTIRUN" in args.overrides
    if (args.resolve or args.package) and not args.cfg:
        raise ConfigError("--resolve and --package need --cfg", hint="add --cfg job")
    if args.multirun and args.cfg:
        raise ConfigError("--cfg shows a single config, not a sweep", hint="remove -m, and give each key one value")
    return args


def has_hydra_flag(args: argparse.Namespace) -> bool:
    """Return whether a flag of Hydra is given that most commands do not take; all take `--config-dir`."""
    return bool(args.multirun or args.cfg or args.info or args.hydra_help or args.shell_completion)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.match(r"-[\d.]", word)


def _unknown_flag(word: str, known: set[str], *, takes_directory: bool) -> Problem:
    flag, _, value = word.partition("=")
    key = flag.lstrip("-").replace("-", "_")
    close = None if key.partition(".")[0] in RootKeys.__annotations__ else nearest(flag, known)
    hint = f"did you mean {close}?" if close else f"keys have no dashes: write {key or 'KEY'}={value or 'VALUE'}"
    if takes_directory and not value:
        hint = f"write ./{word} if a directory has this name" + (f"; {hint}" if close else "")
    return Problem(f"{word}: there is no such flag", hint)


def parse_for_one_config(argv: Sequence[str], **flags: Any) -> tuple[argparse.Namespace, Composed]:
    """Parse the command line of a command that inspects a single config, and compose this config.

    Raises:
        ConfigError: the command line or the config is wrong.
    """
    args = parse(argv, **flags)
    if has_hydra_flag(args):
        cause = "this command takes one config, and none of Hydra's flags"
        raise ConfigError(cause, hint="remove -m, --cfg and other flags of Hydra")
    report_ignored_configs(args)
    composed = compose(args)
    print_notes(composed.notes)
    return args, composed


@contextmanager
def only_answer_on_stdout(args: argparse.Namespace) -> Iterator[None]:
    """Send what user code prints to stderr if `--json` is given, so that stdout holds only JSON."""
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        yield


def report_ignored_configs(args: argparse.Namespace) -> None:
    """Print which of the user's config files Hydra does not read."""
    for file, reason in ignored_configs(args.config_dir):
        print_note(f"note: {file} is ignored: {reason}")


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr. They are not part of the answer on stdout."""
    for note in notes:
        print_note(note)


def print_last(names: Iterable[str]) -> None:
    """Print which run or sweep the word `last` means, if it is one of the names and there is a run."""
    newest = Path("outputs/latest")
    if "last" in names and newest.is_dir():
        print_note(f"note: last is {display_path(newest.resolve())}, the newest in outputs")


def print_note(note: str) -> None:
    """Print a note to stderr at once, also if stderr is a pipe."""
    print(printable(note), file=sys.stderr, flush=True)


def compose(args: argparse.Namespace) -> Composed:
    """Compose the config of a command line.

    Raises:
        ConfigError: everything that is wrong with the config, including wrong arguments of a `_target_`.
    """
    try:
        return compose_run(args.overrides, args.config_dir)
    except ConfigError as error:
        unchecked: Unchecked | None = error.composed
        if unchecked is None:
            raise
        reported = {problem.cause.partition(": ")[0] for problem in error.problems}
        found = unchecked.find_wrong_arguments()
        more = [problem for problem in found if problem.cause.partition(": ")[0] not in reported]
        raise ConfigError(*error.problems, *more) from error


def show(args: argparse.Namespace) -> bool:
    """Print the output of a print-only Hydra flag, such as `--cfg`. Return False if no such flag is given."""
    if not (args.cfg or args.info or args.hydra_help):
        return False
    composed = compose_run(args.overrides, args.config_dir)
    print_notes(composed.notes)
    if args.cfg in ("job", "all"):
        shown = config_text(composed, args.package, resolve=args.resolve, with_hydra=args.cfg == "all")
        print(shown, end="")
        return True
    from hydra._internal.hydra import Hydra

    logging.raiseExceptions = False  # print no logging error if the reader closes the pipe early, as `| head` does
    hydra = Hydra.create_main_hydra2("trainkit", search_path(args.config_dir))
    overrides = mark_new_arguments(args.overrides)
    if args.cfg:
        text = io.StringIO()
        with redirect_stdout(text):
            hydra.show_cfg("config", overrides, args.cfg, args.package, args.resolve)
        print(remove_secrets(text.getvalue(), composed), end="")
    elif args.hydra_help:
        hydra.hydra_help("config", get_args_parser(), args)
    else:
        hydra.show_info(args.info, "config", overrides, run_mode=RunMode.RUN)
    return True

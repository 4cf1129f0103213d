"""Hydra's own flags: the command line as Hydra parses it, and those flags that only show something."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.compose import Composed, compose_run, search_path, unread
from trainkit.config.schema import Schema
from trainkit.config.targets import check_targets
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.redaction import find_secrets, redact_by_key, redact_command_line
from trainkit.core.spelling import nearest

REFUSED = {
    "config_name": "the root config is trainkit's own; choose experiment=NAME",
    "config_path": "configs of your own are found in ./conf or with --config-dir DIR",
    "experimental_rerun": "a run's command is in its run.json",
}


def parse(argv: Sequence[str], **own: Any) -> argparse.Namespace:
    """The command line by Hydra's own parser; overrides and flags in any order.

    Args:
        argv: without the command's name.
        own: the flags of a command, each with its default; False for one that takes no value.

    Raises:
        ConfigError: a flag that there is not, or that means nothing here.
    """

    def wrong(message: str) -> NoReturn:
        raise ConfigError(message, hint="trainkit --help lists the flags")

    parser = get_args_parser()
    parser.error = wrong  # type: ignore[method-assign]
    for name, default in own.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    known = {flag for action in parser._actions for flag in action.option_strings}
    problems = []
    for word in argv:
        flag, _, value = word.partition("=")
        if flag.startswith("-") and flag not in known and not re.match(r"-[\d.]", flag):
            key = flag.lstrip("-").replace("-", "_")
            near = None if key.partition(".")[0] in Schema.__annotations__ else nearest(flag, known)
            hint = f"did you mean {near}?" if near else f"keys have no dashes: write {key or 'KEY'}={value or 'VALUE'}"
            problems.append(Problem(f"{word}: there is no such flag", hint))
    if problems:
        raise ConfigError(*problems)
    args = parser.parse_intermixed_args(list(argv))
    for name, instead in REFUSED.items():
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} means nothing here", hint=instead)
    args.multirun |= "hydra.mode=MULTIRUN" in args.overrides
    if (args.resolve or args.package) and not args.cfg:
        raise ConfigError("--resolve and --package go with --cfg", hint="add --cfg job")
    if args.multirun and args.cfg:
        raise ConfigError("--cfg shows one config, not a sweep's", hint="leave out -m, and give each key one value")
    return args


def one_config(argv: Sequence[str], **own: Any) -> tuple[argparse.Namespace, Composed]:
    """The command line of a command that looks at one config and leaves no run; and that config."""
    args = parse(argv, **own)
    if args.multirun or args.cfg or args.info or args.hydra_help or args.shell_completion:
        raise ConfigError("this command takes one config, and no flag of Hydra's", hint="leave out -m and --cfg")
    report_unread_configs(args)
    return args, compose(args)


@contextmanager
def answer_alone(args: argparse.Namespace) -> Iterator[None]:
    """With `--json`, send what the user's own code prints to stderr: stdout is for the answer."""
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        yield


def report_unread_configs(args: argparse.Namespace) -> None:
    """Say which of the user's configs nothing reads."""
    for file, why in unread(args.config_dir):
        print(f"note: {file} goes unread: {why}", file=sys.stderr)


def compose(args: argparse.Namespace) -> Composed:
    """The config that a command line asks for; its error tells of wrong arguments too.

    Only where somebody wrote arguments of their own does the answer wait for the import that knows
    what a signature takes.
    """
    try:
        return compose_run(args.overrides, args.config_dir)
    except ConfigError as error:
        composed: Composed | None = error.composed
        if composed is None or not (composed.own_files or _adds_arguments(composed)):
            raise
        try:
            more = check_targets(OmegaConf.to_container(composed.config, resolve=True))
        except OmegaConfBaseException:  # an interpolation that is told of already
            raise error from None
        told = {problem.cause.partition(": ")[0] for problem in error.problems}
        more = [problem for problem in more if problem.cause.partition(": ")[0] not in told]
        raise ConfigError(*error.problems, *more) from error


def _adds_arguments(composed: Composed) -> bool:
    nodes = [text.lstrip("+").partition("=")[0].rpartition(".")[0] for text in composed.overrides if text[:1] == "+"]
    added = [OmegaConf.select(composed.config, node, throw_on_missing=False) for node in nodes if node]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in added)


def show(args: argparse.Namespace) -> bool:
    """Answer a flag that only shows something; False where there is none."""
    if not (args.cfg or args.info or args.hydra_help or args.shell_completion):
        return False
    if args.shell_completion:
        _complete(args)
        return True
    composed = compose_run(args.overrides, args.config_dir)
    if args.cfg == "job":
        _print(composed, args.package, args.resolve)
        return True
    from hydra._internal.hydra import Hydra

    logging.raiseExceptions = False  # the reader of our output may leave, as `| head` does
    hydra = Hydra.create_main_hydra2("trainkit", search_path(args.config_dir))
    if args.cfg:
        shown = io.StringIO()
        with redirect_stdout(shown):
            hydra.show_cfg("config", args.overrides, args.cfg, args.package, args.resolve)
        _show(shown.getvalue(), composed)
    elif args.hydra_help:
        hydra.hydra_help("config", get_args_parser(), args)
    else:
        hydra.show_info(args.info, "config", args.overrides, run_mode=RunMode.RUN)
    return True


def _print(composed: Composed, package: str | None, resolve: bool) -> None:
    node = OmegaConf.select(composed.config, package) if package else composed.config
    if not OmegaConf.is_config(node):
        raise ConfigError(f"--package {package}: the config has no such part", hint="for example --package optim")
    shown = OmegaConf.create(redact_by_key(OmegaConf.to_container(node, resolve=resolve)))
    _show(OmegaConf.to_yaml(shown), composed)


def _show(text: str, composed: Composed) -> None:
    plain = [OmegaConf.to_container(node, resolve=False) for node in (composed.config, composed.hydra)]
    secrets = {secret for node in plain for secret in find_secrets(node)}
    print("".join(redact_command_line(text.splitlines(keepends=True), secrets)), end="")


def _complete(args: argparse.Namespace) -> None:
    from hydra._internal.hydra import Hydra

    hydra = Hydra.create_main_hydra2("trainkit", search_path(args.config_dir))
    asked = args.overrides[:1]
    if not asked or not asked[0].startswith(("install=", "uninstall=", "query=")):
        raise ConfigError("--shell-completion: nothing asked for", hint='eval "$(trainkit -sc install=bash)"')
    if asked[0].startswith("query=") and "COMP_LINE" not in os.environ:
        raise ConfigError("-sc query=… is the shell's to ask", hint='eval "$(trainkit -sc install=bash)"')
    try:
        hydra.shell_completion("config", args.overrides)
    except ValueError as error:
        raise ConfigError(f"--shell-completion: {error}", hint="write install=bash, zsh or fish") from error

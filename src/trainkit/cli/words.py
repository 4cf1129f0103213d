"""Parse the command line of a command that takes words and flags, and no flag of Hydra. Imports no Hydra."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainkit.core.errors import ConfigError
from trainkit.core.spelling import nearest


def parse_words(
    argv: Sequence[str], command: str, switches: Sequence[str], options: Sequence[str], usage: str
) -> argparse.Namespace:
    """Return the flags, and under `words` the other words. Words after `--` are no flags, and `-` is a word.

    Args:
        argv: without the name of the command.
        command: the name of the command, for messages.
        switches: flags without a value, such as `--json`.
        options: flags with a value, a string; None if it is not given.
        usage: the hint if a value is missing.

    Raises:
        ConfigError: a flag is unknown, or lacks its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for flag in switches:
        parser.add_argument(flag, action="store_true")
    for flag in options:
        parser.add_argument(flag)

    def fail(message: str) -> NoReturn:
        raise ConfigError(message, hint=usage)

    parser.error = fail  # type: ignore[method-assign]
    flags = [*switches, *options]
    for word in [*argv][: [*argv, "--"].index("--")]:
        flag = word.partition("=")[0]
        if word.startswith("-") and word != "-" and flag not in flags:
            close = nearest(flag, flags)
            hint = f"did you mean {close}?" if close else f"the flags are {', '.join(flags)}; a file: ./{word}"
            raise ConfigError(f"{word}: {command} has no such flag", hint=hint)
    return parser.parse_intermixed_args(list(argv))


def whole_number(flag: str, text: str | None) -> int | None:
    """Return the value of a flag as a whole number of at least 1; None if the flag is not given.

    Raises:
        ConfigError: the value is not such a number.
    """
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise ConfigError(f"{flag} {text}: must be a whole number of at least 1", hint=f"for example {flag} 10")
    return int(text)


def new_file(flag: str, name: str) -> Path:
    """Return the file that a flag names.

    Raises:
        ConfigError: it is a folder, or its folder does not exist.
    """
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        cause = "it is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise ConfigError(f"{flag} {name}: {cause}", hint="name a file in a folder that exists")
    return path

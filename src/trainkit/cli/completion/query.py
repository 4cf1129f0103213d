"""Answer the flag `--shell-completion`: print a script, or the completions of a command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainkit.cli.completion.candidates import candidates
from trainkit.cli.completion.line import bash_replacement, read_line
from trainkit.cli.completion.scripts import HINTS, SCRIPTS, script
from trainkit.core.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Print what `install=SHELL`, `uninstall=SHELL` or `query=SHELL` asks for.

    Raises:
        ConfigError: the command line asks for something else.
    """
    words = [word.partition("=") for word in argv if word.partition("=")[0] in (*SCRIPTS, "query")]
    if not words:
        raise ConfigError("--shell-completion: install, uninstall or query is missing", hint=HINTS["bash"])
    action, _, shell = words[0]
    if shell not in HINTS:
        raise ConfigError(f"--shell-completion: there is no shell {shell!r}", hint="write install=bash, zsh or fish")
    if action != "query":
        print(script(action, shell, Path(sys.argv[0]).name), end="")
        return 0
    line = os.environ.get("COMP_LINE")
    if line is None:
        raise ConfigError("-sc query=… works only inside a shell", hint=HINTS[shell])
    for answer in _answers(line, shell):
        print(answer)
    return 0


def _answers(text: str, shell: str) -> list[str]:
    """Return the completions of a command line; none if anything fails, because a shell would show the error."""
    try:
        line = read_line(text)
        found = candidates(line.words, line.current)
    except Exception:
        return []
    replaced = os.environ.get("COMP_WORD")
    if shell == "bash" and replaced is not None:
        return [bash_replacement(word, line, replaced) for word in found]
    return found

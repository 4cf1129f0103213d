"""Find the words that may stand at the cursor of a command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from trainkit.cli.completion.overrides import key_candidates, key_names, value_candidates
from trainkit.cli.completion.paths import file_candidates, run_candidates
from trainkit.cli.completion.scripts import HINTS
from trainkit.cli.help import FLAGS, USAGES, command_names, flags_of
from trainkit.config.choices import find_groups

PATH_KEYS = re.compile(r"(^|[._])(file|files|path|root|dir|directory|folder)$")
RUN_KEYS = ("init_from", "init_from.path", "training_step.teacher")
OVERRIDES = "KEY=VALUE"


def candidates(words: Sequence[str], current: str) -> list[str]:
    """Return the words that may stand at the cursor and start with `current`.

    Args:
        words: the words between `trainkit` and the current word, without quotes.
        current: the part of the current word before the cursor, without quotes.
    """
    found = [word for word in _candidates(words, current) if word.startswith(current) and word.isprintable()]
    return list(dict.fromkeys(found))


def _candidates(words: Sequence[str], current: str) -> list[str]:
    commands = command_names()
    command, rest = (words[0], words[1:]) if words and words[0] in commands else ("train", words)
    previous = words[-1] if words else ""
    flags = _flags(command)
    if previous in VALUES:
        return VALUES[previous](current)
    if flags.get(previous):  # a number or a name, which cannot be completed
        return []
    if current.startswith("-"):
        return [*flags, "--help"]
    config_dir = next((b for a, b in itertools.pairwise(rest) if a in ("-cd", "--config-dir")), None)
    given = [
        word
        for before, word in zip(["", *rest], rest, strict=False)
        if not word.startswith("-") and not (before in VALUES or flags.get(before))
    ]
    kind = _kind(command, given)
    if kind in POSITIONS:
        return POSITIONS[kind](current)
    if kind == "GROUP":
        return find_groups(config_dir)
    overrides = [word for word in given if "=" in word or word.startswith("~")]
    if kind == "KEY":
        names = key_names(current, overrides, config_dir)
        return [*names, *(find_groups(config_dir) if "." not in current else ())]
    if kind != OVERRIDES:
        return []
    found = _override(current, overrides, config_dir)
    return [*found, *(commands if not words else ())]


def _override(current: str, before: Sequence[str], config_dir: str | None) -> list[str]:
    key, equals, value = current.partition("=")
    if not equals:
        return key_candidates(current, before, config_dir)
    head, comma, _ = value.rpartition(",")  # of several values, in a sweep
    last = value[len(head) + len(comma) :]
    name = key.lstrip("+")
    if name in RUN_KEYS:
        found = [*run_candidates(last), *file_candidates(last), "off"]
    elif PATH_KEYS.search(name) or last.startswith(("/", "./", "../", "~/")):
        found = file_candidates(last)
    else:
        found = value_candidates(name, before, config_dir)
    return [f"{key}={head}{comma}{word}" for word in found]


def _kind(command: str, given: Sequence[str]) -> str:
    """Return the kind of the next positional word, as the usage of the command names it; empty if there is none."""
    usage = USAGES.get(command, f"[{OVERRIDES} ...]").partition("      ")[0]
    words = [word.strip("[]") for word in usage.split()]
    kinds = [word for word in words if word.removesuffix("...") in (*POSITIONS, "GROUP", "KEY", OVERRIDES)]
    kind = kinds[min(len(given), len(kinds) - 1)] if kinds else ""
    is_repeated = kind.endswith("...") or kind == OVERRIDES
    return kind.removesuffix("...") if len(given) < len(kinds) or is_repeated else ""


def _flags(command: str) -> dict[str, bool]:
    """Return the flags of a command, and whether a value follows each, as the rows of its help show them."""
    found: dict[str, bool] = {}
    rows = list(flags_of(command))
    if command == "train":
        rows += FLAGS
    elif OVERRIDES in USAGES.get(command, OVERRIDES):
        rows += [row for row in FLAGS if "--config-dir" in row]
    for row in rows:
        for name, *value in (part.split() for part in row.split(", ")):
            if name.startswith("-"):
                found[name] = bool(value)
    return found


def _folder(current: str) -> list[str]:
    return file_candidates(current, only_folders=True)


def _completion(_: str) -> list[str]:
    return [f"{action}={shell}" for action in ("install", "uninstall") for shell in HINTS]


def _words(*words: str) -> Callable[[str], list[str]]:
    return lambda _: list(words)


# From the word at the cursor to candidates: for the value of a flag, and for a positional word of a usage.
VALUES: dict[str, Callable[[str], list[str]]] = {
    "-cd": _folder,
    "--config-dir": _folder,
    "-c": _words("job", "hydra", "all"),
    "--cfg": _words("job", "hydra", "all"),
    "-i": _words("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--info": _words("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-sc": _completion,
    "--shell-completion": _completion,
    "--plot": file_candidates,
    "--output": file_candidates,
    "--format": _words("onnx", "torch", "safetensors"),
    "--checkpoint": _words("best", "last"),
    "--run": run_candidates,
}
POSITIONS: dict[str, Callable[[str], list[str]]] = {
    "RUN": run_candidates,
    "PATH": run_candidates,
    "FILE": file_candidates,
    "DIR": _folder,
}

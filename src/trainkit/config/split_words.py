"""Find the values of a command line that the shell splits at their spaces, and lists for a group of one choice."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from omegaconf import DictConfig

from trainkit.config.dotted_choices import DOTTED_GROUPS
from trainkit.config.schema import RootKeys
from trainkit.core.errors import Problem


def find_split_words(words: Iterable[str]) -> list[Problem]:
    """Return a problem for each override that arrives as several words, such as `optim=sgd,` and `adam`."""
    groups: list[list[str]] = []
    for word in words:
        if groups and _continues(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [_problem(group) for group in groups if len(group) > 1]


def _continues(group: Sequence[str], word: str) -> bool:
    """Return whether a word belongs to the override whose first words are `group`."""
    text = " ".join(group)
    if re.fullmatch(r"[+]*[\w./]+", text):
        return word.startswith("=")
    if "=" in word or "=" not in text or word.startswith("~"):
        return False
    is_open = sum(map(text.count, "([{")) > sum(map(text.count, ")]}"))
    return is_open or text.endswith(("=", ",")) or word not in RootKeys.__annotations__


def _problem(group: Sequence[str]) -> Problem:
    """Return the problem of an override that arrives as several words; the hint holds the override as one word."""
    text, word = " ".join(group), _as_one_word(group)
    if re.match(r"[^=]*(\s=|=\s)", text):
        return Problem(f"{text}: there are spaces around =", f"write {shlex.quote(word)}, without spaces")
    cause = f"{text}: the shell splits this at its spaces"
    if ":" in text:
        return Problem(cause, f"quote the whole word: {_quoted(text)}")
    if re.search(r"[,\[({]", text):
        return Problem(cause, f"write no space after the comma, or quote the whole word: {_quoted(word)}")
    return Problem(cause, f"write -m {shlex.quote(word)} to try each value, or quote the whole word: {_quoted(text)}")


def _as_one_word(group: Sequence[str]) -> str:
    """Join words; put a comma where it is missing, and keep the space that YAML needs after a colon."""
    text = ""
    for word in group:
        if text.endswith(":"):
            text += " "
        elif text and "=" in text and not text.endswith(tuple("=,[({")) and word[0] not in ",:])}":
            text += ","
        text += word
    return text


def _quoted(word: str) -> str:
    return shlex.quote(word) if "'" in word else f"'{word}'"


def find_merged_choices(overrides: Iterable[str], config: DictConfig) -> list[Problem]:
    """Return a problem for each override such as `optim=[sgd,adam]`, whose choices are merged into one `_target_`."""
    problems = []
    for text in overrides:
        group, _, value = text.lstrip("+").partition("=")
        node = config.get(group) if group in DOTTED_GROUPS else None
        names = [name.strip() for name in value[1:-1].split(",")] if re.fullmatch(r"\[.*\]", value) else []
        if len(names) > 1 and isinstance(node, DictConfig) and "_target_" in node:
            hint = f"write {group}={names[0]}; -m {group}={','.join(names)} tries each"
            problems.append(Problem(f"{text}: {group} takes one choice", hint))
    return problems

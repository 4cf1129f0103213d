"""Read the comments of config.yaml, which describe its keys for `--help` and for the JSON schema."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainkit.config.search_path import CONF


@dataclass(frozen=True)
class KeyComment:
    """The default of a key as it is written, and the comment behind it."""

    default: str
    text: str


def key_comments(file: Path | None = None) -> dict[str, KeyComment]:
    """Return the comments of a config file (config.yaml if None is given) by dotted keys."""
    comments: dict[str, KeyComment] = {}
    path: list[str] = []
    for line in (file or CONF / "config.yaml").read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)([\w]+): *(.*?) *(?:# (.*))?$", line)
        if match is None:
            continue
        indent, key, value, text = match.groups()
        path = [*path[: len(indent) // 2], key]
        if text:
            comments[".".join(path)] = KeyComment(value, text)
    return comments

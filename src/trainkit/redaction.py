"""Keeping secrets out of files: by the name of their key, and as they stand in any text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SECRET_KEY = re.compile("key|token|secret|password", re.IGNORECASE)
REDACTED = "***"
SHORTEST = 4  # characters of a secret that is looked for inside other words


def is_secret(key: Any) -> bool:
    """Whether the strings under a key of that name are secrets."""
    return SECRET_KEY.search(str(key)) is not None


def redacted(node: Any, *, secret: bool = False) -> Any:
    """Plain containers with every secret string replaced; interpolations stay, as they say only where to look."""
    if isinstance(node, Mapping):
        return {key: redacted(value, secret=is_secret(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [redacted(value, secret=secret) for value in node]
    return REDACTED if secret and isinstance(node, str) and "${" not in node and node != "???" else node


def secrets_in(node: Any, *, secret: bool = False) -> Iterator[str]:
    """The secret strings in plain containers."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from secrets_in(value, secret=is_secret(key))
    elif isinstance(node, list):
        for value in node:
            yield from secrets_in(value, secret=secret)
    elif secret and isinstance(node, str) and node not in ("", REDACTED, "???") and "${" not in node:
        yield node


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """A text without the secrets: wherever they stand, or where short ones are all of a `KEY=VALUE`'s value."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, REDACTED)
        elif text.partition("=")[2].strip("'\"") == secret and is_secret(text.partition("=")[0]):
            text = f"{text.partition('=')[0]}={REDACTED}"
    return text

"""Redaction of secrets, found by the name of their key and by their text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

REDACTED = "***"
MIN_SECRET_LENGTH = 4  # characters; a shorter secret is not searched for in other text
SECRET_KEY = re.compile("key|token|secret|password", re.IGNORECASE)
# Words that contain `key` or `token` and do not name a secret.
HARMLESS_WORDS = r"tokeni[sz]\w*|keypoints?|keywords?|keyframes?|keyboard|monkey"
# KEY=VALUE or KEY: VALUE up to the end of the text, unless the value is a number, a boolean or a reference.
SECRET_ASSIGNMENT = re.compile(
    rf"((?<![\w.])(?![\w.]*(?:{HARMLESS_WORDS})['\"]?\s*[=:])[\w.]*(?:key|token|secret|password)[\w.]*['\"]?\s*[=:]\s*)"
    r"(?!\[?[\d.,eE+-]+\]?(?:[,}\s]|$)|(?:null|true|false)\b|['\"]?\$\{[\w.:]+\}['\"]?(?:[,}\s]|$)).*",
    re.IGNORECASE | re.DOTALL,
)
REFERENCE = re.compile(r"\$\{[\w.:]+\}")


def is_secret(key: Any) -> bool:
    """Return whether strings under this key are secrets."""
    return SECRET_KEY.search(re.sub(HARMLESS_WORDS, "", str(key), flags=re.IGNORECASE)) is not None


def redact_by_key(node: Any, *, secret: bool = False) -> Any:
    """Return plain containers with the strings under secret keys replaced.

    References such as `${oc.env:NAME}` are kept.
    """
    if isinstance(node, Mapping):
        inside = secret and "_target_" not in node
        return {
            key: value if key == "param_groups" else redact_by_key(value, secret=inside or is_secret(key))
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [redact_by_key(value, secret=secret) for value in node]
    return REDACTED if secret and _is_text(node) else node


def find_secrets(node: Any, *, secret: bool = False) -> Iterator[str]:
    """Yield the strings under secret keys in plain containers."""
    if isinstance(node, Mapping):
        inside = secret and "_target_" not in node
        for key, value in node.items():
            if key != "param_groups":  # the keys below are the names of rules
                yield from find_secrets(value, secret=inside or is_secret(key))
    elif isinstance(node, list):
        for value in node:
            yield from find_secrets(value, secret=secret)
    elif secret and _is_text(node) and node != REDACTED:
        yield node


def environment_secrets(text: str) -> Iterator[str]:
    """Yield the values of the environment variables that a config's text refers to."""
    for name in re.findall(r"\$\{oc\.env:(\w+)", text):
        value = os.environ.get(name, "")
        if len(value) >= MIN_SECRET_LENGTH and not value.isdigit():
            yield value


def redact_command_line(node: Any, secrets: Iterable[str]) -> Any:
    """Return plain containers of command-line words with `token=…` and known secrets replaced."""
    if isinstance(node, Mapping):
        return {key: redact_command_line(value, secrets) for key, value in node.items()}
    if isinstance(node, list):
        return [redact_command_line(value, secrets) for value in node]
    return replace_secrets(SECRET_ASSIGNMENT.sub(rf"\1{REDACTED}", node), secrets) if isinstance(node, str) else node


def replace_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return the text with each secret of at least `MIN_SECRET_LENGTH` characters replaced by `REDACTED`."""
    for secret in sorted(secrets, key=len, reverse=True):  # longest first: a secret may contain another
        if len(secret) >= MIN_SECRET_LENGTH:
            text = text.replace(secret, REDACTED)
    return text


def _is_text(node: Any) -> bool:
    return isinstance(node, str) and node not in ("", "???") and REFERENCE.fullmatch(node) is None

"""Keeping secrets out of files: by the names of their keys, and wherever else their text stands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

REDACTED = "***"
MIN_SECRET_LENGTH = 4  # characters of a secret that is looked for inside other words
SECRET_KEY = re.compile("key|token|secret|password", re.IGNORECASE)
# Words of the field that hold one of those and are none.
ORDINARY = r"tokeni[sz]\w*|keypoints?|keywords?|keyframes?|keyboard|monkey"
# KEY=VALUE or KEY: VALUE up to the end, but where the value is a number or says only where to look.
SPOKEN = re.compile(
    rf"((?<![\w.])(?![\w.]*(?:{ORDINARY})['\"]?\s*[=:])[\w.]*(?:key|token|secret|password)[\w.]*['\"]?\s*[=:]\s*)"
    r"(?!\[?[\d.,eE+-]+\]?(?:[,}\s]|$)|(?:null|true|false)\b|['\"]?\$\{[\w.:]+\}['\"]?(?:[,}\s]|$)).*",
    re.IGNORECASE | re.DOTALL,
)
ONLY_A_REFERENCE = re.compile(r"\$\{[\w.:]+\}")


def is_secret(key: Any) -> bool:
    """Whether the strings under a key of that name are secrets."""
    return SECRET_KEY.search(re.sub(ORDINARY, "", str(key), flags=re.IGNORECASE)) is not None


def redact_by_key(node: Any, *, secret: bool = False) -> Any:
    """Plain containers with every secret string replaced; a reference such as `${oc.env:NAME}` stays."""
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
    """The secret strings in plain containers."""
    if isinstance(node, Mapping):
        inside = secret and "_target_" not in node
        for key, value in node.items():
            if key != "param_groups":  # whose rules have names of their own
                yield from find_secrets(value, secret=inside or is_secret(key))
    elif isinstance(node, list):
        for value in node:
            yield from find_secrets(value, secret=secret)
    elif secret and _is_text(node) and node != REDACTED:
        yield node


def environment_secrets(text: str) -> Iterator[str]:
    """The values of the variables that a config's text refers to."""
    for name in re.findall(r"\$\{oc\.env:(\w+)", text):
        value = os.environ.get(name, "")
        if len(value) >= MIN_SECRET_LENGTH and not value.isdigit():
            yield value


def redact_command_line(node: Any, secrets: Iterable[str]) -> Any:
    """Plain containers whose strings are words of a command line: `token=…` and known secrets are replaced."""
    if isinstance(node, Mapping):
        return {key: redact_command_line(value, secrets) for key, value in node.items()}
    if isinstance(node, list):
        return [redact_command_line(value, secrets) for value in node]
    return replace_secrets(SPOKEN.sub(rf"\1{REDACTED}", node), secrets) if isinstance(node, str) else node


def replace_secrets(text: str, secrets: Iterable[str]) -> str:
    """A text without the secrets, wherever they stand."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_SECRET_LENGTH:
            text = text.replace(secret, REDACTED)
    return text


def _is_text(node: Any) -> bool:
    return isinstance(node, str) and node not in ("", "???") and ONLY_A_REFERENCE.fullmatch(node) is None

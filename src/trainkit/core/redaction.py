"""Redaction of secrets, found by the name of their key, in URLs, and by their text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

REDACTED = "***"
MIN_SECRET_LENGTH = 4  # characters; a shorter secret is replaced only in the text of errors, as a whole word
MIN_LINE_LENGTH = 8  # characters; shorter lines of a secret with several lines are not replaced one by one
# Under keys with these words, numbers are secrets too. `num_tokens: 512` and `key_size: 8` are ordinary numbers.
PASSWORD_KEY = re.compile("secret|passw(or)?d|passphrase|passcode|pwd|credential", re.IGNORECASE)
SECRET_KEY = re.compile(f"key|token|authorization|{PASSWORD_KEY.pattern}", re.IGNORECASE)
# Words that contain `key` or `token` and do not name a secret. They end before a capital letter or any non-letter.
HARMLESS_WORD = re.compile(
    r"(?:tokeni[sz](?:ations?|ers?|ed|es?|ing)|key(?:point|word|frame|board|_?encoder)s?|monkeys?)"
    r"(?=[^a-z]|$|(?-i:(?<=[a-z])[A-Z]))",
    re.IGNORECASE,
)
_NODE = r"\$\{\s*[\w.]+\s*\}"  # ${other.key}
_NAME = rf"""(?:{_NODE}|'[\w.]+'|"[\w.]+"|[\w.]+)"""
# An interpolation without a literal value: ${other.key}, ${oc.env:NAME}, ${oc.env:${other.key}}.
REFERENCE = re.compile(rf"{_NODE}|\$\{{\s*[\w.]+\s*:\s*{_NAME}\s*\}}")
ASSIGNMENT = re.compile(r"(?<![\w.])([\w.]+)['\"]?\s*[=:]\s*")  # KEY=VALUE or KEY: VALUE, up to the value
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_WORD = rf"(?:null|true|false|['\"]?(?:{REFERENCE.pattern}|{re.escape(REDACTED)})['\"]?)"
_END = r"\s*(?:$|[}\]]|,\s*['\"]?[\w.]+['\"]?\s*:)"  # of a value: the end of the text or the next key
NOT_SECRET_VALUE = re.compile(rf"\[?(?:{_NUMBER}|{_WORD})(?:\s*,\s*(?:{_NUMBER}|{_WORD}))*\]?{_END}", re.IGNORECASE)
NOT_PASSWORD_VALUE = re.compile(rf"{_WORD}{_END}", re.IGNORECASE)
ENVIRONMENT = re.compile(r"""oc\.env\s*:\s*['"]?(\w+)""")  # the variable in ${oc.env:NAME}
NEXT_KEY = re.compile(r",\s*['\"]?[\w.]+['\"]?\s*:")
PUNCTUATION = " \t\n,;'\"[](){}"
URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*:)([^/\s]+)(?=@)")
URL_TOKEN = re.compile(r"(https?://)([^/\s:@]+)(?=@)")  # a token as the user, such as that of GitHub
URL_PARAMETER = re.compile(r"(?<=[?&;])([\w.-]+)=([^&#\s'\"]+)")


def is_secret(key: Any) -> bool:
    """Return whether strings under this key are secrets."""
    return SECRET_KEY.search(HARMLESS_WORD.sub(" ", str(key))) is not None


def redact_by_key(node: Any) -> Any:
    """Return plain containers with the secrets replaced: values under secret keys, and URLs with a password.

    References such as `${oc.env:NAME}` are kept.
    """
    return _replace(node, lambda value, kinds: REDACTED if _is_secret_value(value, kinds) else value)


def find_secrets(node: Any) -> Iterator[str]:
    """Yield the secrets in plain containers: values under secret keys, and passwords in URLs."""
    found: list[str] = []

    def collect(value: Any, kinds: tuple[type, ...]) -> None:
        if isinstance(value, str):
            found.extend(_url_secrets(value))
        if value != REDACTED and isinstance(value, kinds) and _is_secret_value(value, kinds):
            found.append(str(value))

    _replace(node, collect)
    yield from found


def environment_secrets() -> Iterator[str]:
    """Yield the values of the environment variables whose name is that of a secret, such as HF_TOKEN.

    A path is not a secret.
    """
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= MIN_LINE_LENGTH and not os.path.exists(value):  # noqa: PTH110
            yield value


def redact_copies(node: Any, secrets: Iterable[str]) -> Any:
    """Return plain containers with each string replaced that contains one of the longer secrets."""
    known = [secret for secret in secrets if len(secret) >= MIN_LINE_LENGTH]
    return _replace(
        node, lambda value, _: REDACTED if isinstance(value, str) and any(text in value for text in known) else value
    )


def redact_command_line(node: Any, secrets: Iterable[str]) -> Any:
    """Return plain containers of command-line words with `token=…` and known secrets replaced."""
    if isinstance(node, Mapping):
        return {key: redact_command_line(value, secrets) for key, value in node.items()}
    if isinstance(node, list):
        return [
            REDACTED if isinstance(word, str) and _is_secret_flag(before) else redact_command_line(word, secrets)
            for before, word in zip(["", *node], node, strict=False)
        ]
    return replace_secrets(_redact_assignment(node), secrets) if isinstance(node, str) else node


def replace_secrets(text: str, secrets: Iterable[str], *, short: bool = False) -> str:
    """Return the text with each secret replaced by `REDACTED`.

    Args:
        text: any text.
        secrets: the secrets. A number is replaced as a whole word only.
        short: replace secrets of less than `MIN_SECRET_LENGTH` characters too, as whole words.
    """
    spellings = {spelling for secret in secrets for spelling in _spellings(secret)}
    for secret in sorted(spellings, key=len, reverse=True):  # longest first: a secret may contain another
        if len(secret) >= MIN_SECRET_LENGTH and not secret.isdigit():
            text = text.replace(secret, REDACTED)
        elif len(secret) >= MIN_SECRET_LENGTH or short:
            text = re.sub(rf"(?<!\w)(?<!\d\.){re.escape(secret)}(?!\w|\.\d)", REDACTED, text)
    return text


def hide_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return a message without secrets. A short secret is replaced only where a value begins, as after `=`."""
    secrets = set(secrets) - {REDACTED}
    text = replace_secrets(text, secrets)
    short = sorted((secret for secret in secrets if 0 < len(secret) < MIN_SECRET_LENGTH), key=len, reverse=True)
    for secret in short:
        text = re.sub(rf"""([=:/,'"\[({{]\s*){re.escape(secret)}(?!\w)""", rf"\1{REDACTED}", text)
    return text


def hide_arguments(text: str, words: Iterable[str]) -> str:
    """Return a message about a command line without the secrets in its words.

    A message may quote a word as a whole, one of its values, or a value of the environment that the word refers to.
    """
    words = list(words)
    secrets = set(environment_secrets())
    for word, clean in sorted(zip(words, redact_command_line(words, ()), strict=True), key=lambda pair: -len(pair[0])):
        secrets |= {os.environ[name] for name in ENVIRONMENT.findall(word) if name in os.environ}
        if clean == REDACTED:
            secrets.add(word)
        elif clean != word:
            text = text.replace(word, clean)
            secrets |= {*_url_secrets(word), *_assigned_secrets(word)}
    return hide_secrets(text, secrets)


def _assigned_secrets(word: str) -> Iterator[str]:
    """Yield the values under secret keys in a command-line word, whole and in parts: items of a list and words."""
    for match in ASSIGNMENT.finditer(word):
        if is_secret(match[1]):
            text = word[match.end() :]
            following = NEXT_KEY.search(text)
            if following and not text.startswith("{"):  # the keys of a mapping are as secret as the mapping
                text = text[: following.start()]
            words = [part for part in re.split(rf"[{re.escape(PUNCTUATION)}]+", text) if len(part) >= MIN_SECRET_LENGTH]
            parts = {text, *text.split(","), *words}
            yield from (part.strip(PUNCTUATION) for part in parts if not REFERENCE.search(part))


def _replace(node: Any, change: Any, kinds: tuple[type, ...] = ()) -> Any:
    """Return plain containers with `change(value, kinds)` of each leaf.

    Args:
        node: the containers.
        change: gets a value and the types of value that the key makes secret.
        kinds: those types for the node itself.
    """
    if isinstance(node, Mapping):
        inherited = () if "_target_" in node else kinds
        return {
            # The keys under `param_groups` are the names of rules.
            key: value if key == "param_groups" else _replace(value, change, _secret_kinds(key) or inherited)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_replace(value, change, kinds) for value in node]
    return change(node, kinds)


def _secret_kinds(key: Any) -> tuple[type, ...]:
    """Return the types of values that are secrets under a key."""
    if not is_secret(key):
        return ()
    return (str, int, float) if PASSWORD_KEY.search(str(key)) else (str,)


def _is_secret_value(value: Any, kinds: tuple[type, ...]) -> bool:
    if not isinstance(value, str):
        return isinstance(value, kinds) and not isinstance(value, bool)
    is_value = value not in ("", "???") and REFERENCE.fullmatch(value.strip()) is None
    return (str in kinds and is_value) or any(_url_secrets(value))


def _url_secrets(text: str) -> Iterator[str]:
    """Yield the passwords and secret parameters of the URLs in a text, also without their percent codes."""
    text = REFERENCE.sub("", text)
    found = [match[2] for pattern in (URL_PASSWORD, URL_TOKEN) for match in pattern.finditer(text)]
    found += [match[2] for match in URL_PARAMETER.finditer(text) if is_secret(match[1])]
    for secret in found:
        if secret != REDACTED:
            yield from (secret, unquote(secret))


def _is_secret_flag(word: Any) -> bool:
    return isinstance(word, str) and word.startswith("--") and "=" not in word and is_secret(word)


def _redact_assignment(text: str) -> str:
    """Return a text with everything after the first secret key replaced, unless the value is not a secret."""
    for match in ASSIGNMENT.finditer(text):
        if is_secret(match[1]):
            harmless = NOT_PASSWORD_VALUE if PASSWORD_KEY.search(match[1]) else NOT_SECRET_VALUE
            if not harmless.match(text, match.end()):
                text = text[: match.end()] + REDACTED + ("\n" if text.endswith("\n") else "")
                break
    for secret in sorted(_url_secrets(text), key=len, reverse=True):
        short = len(secret) < MIN_SECRET_LENGTH
        text = re.sub(rf"(?<=[:/]){re.escape(secret)}(?=@)" if short else re.escape(secret), REDACTED, text)
    return text


def _spellings(secret: str) -> set[str]:
    """Return how a secret may appear in a text: as it is, escaped, encoded for a URL, or line by line."""
    lines = [line for line in secret.splitlines() if len(line) >= MIN_LINE_LENGTH]
    escaped = {repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="", errors="replace")}
    return {secret, secret.strip(), *lines, *escaped} - {""}

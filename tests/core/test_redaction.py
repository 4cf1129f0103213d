"""Redaction of secrets by the name of their key and by their text."""

from __future__ import annotations

import pytest

from trainkit.core.redaction import REDACTED, find_secrets, is_secret, redact_by_key, redact_command_line

NODE = {"api_key": "sEcret1", "url": "${oc.env:URL}", "token": "${oc.env:TOKEN}", "more": [{"Password": "sEcret2"}]}


@pytest.mark.parametrize("key", ["api_key", "token", "Password", "client_secret"])
def test_a_key_that_names_a_secret_is_secret(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize("key", ["tokenizer", "keypoints", "keywords", "monkey", "lr"])
def test_a_key_that_only_contains_such_a_word_is_not_secret(key: str) -> None:
    assert not is_secret(key)


def test_strings_under_secret_keys_are_redacted_and_references_are_kept() -> None:
    assert redact_by_key(NODE) == NODE | {"api_key": REDACTED, "more": [{"Password": REDACTED}]}
    assert list(find_secrets(NODE)) == ["sEcret1", "sEcret2"]


def test_words_of_a_command_line_are_redacted_by_key_and_by_text() -> None:
    words = ["hooks.log.api_key=sEcret1", "url=a/sEcret2/b", "num_tokens=5", "tokenizer=bpe"]
    expected = [f"hooks.log.api_key={REDACTED}", f"url=a/{REDACTED}/b", "num_tokens=5", "tokenizer=bpe"]
    assert redact_command_line(words, ["sEcret2"]) == expected

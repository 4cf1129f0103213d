"""Redaction of secrets by the name of their key and by their text."""

from __future__ import annotations

import time

import pytest

from trainkit.core.redaction import (
    REDACTED,
    find_secrets,
    is_secret,
    redact_by_key,
    redact_command_line,
    replace_secrets,
)

NODE = {"api_key": "sEcret1", "url": "${oc.env:URL}", "token": "${oc.env:TOKEN}", "more": [{"Password": "sEcret2"}]}


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "token",
        "Password",
        "client_secret",
        "passwd",
        "passphrase",
        "credentials",
        "tokenizer_api_key",
        "tokenizerAccessKey",
        "tokenization_password",
        "tokenizer_token",
        "keypointsecret",
        "KEYPOINTSECRET",
    ],
)
def test_a_key_that_names_a_secret_is_secret(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize("key", ["tokenizer", "tokenizer_name", "keypoints", "keywords", "monkey", "key_encoder", "lr"])
def test_a_key_that_only_contains_such_a_word_is_not_secret(key: str) -> None:
    assert not is_secret(key)


def test_strings_under_secret_keys_are_redacted_and_references_are_kept() -> None:
    assert redact_by_key(NODE) == NODE | {"api_key": REDACTED, "more": [{"Password": REDACTED}]}
    assert list(find_secrets(NODE)) == ["sEcret1", "sEcret2"]


def test_words_of_a_command_line_are_redacted_by_key_and_by_text() -> None:
    words = ["hooks.log.api_key=sEcret1", "url=a/sEcret2/b", "num_tokens=5", "tokenizer=bpe"]
    expected = [f"hooks.log.api_key={REDACTED}", f"url=a/{REDACTED}/b", "num_tokens=5", "tokenizer=bpe"]
    assert redact_command_line(words, ["sEcret2"]) == expected


@pytest.mark.parametrize(
    "word",
    ["password=true", "num_tokens=12", "n_token=[1,2,3]", "x={num_tokens: 5, b: c}", "token=${oc.env: A}", "lr=1e-3"],
)
def test_a_word_without_a_secret_stays(word: str) -> None:
    assert redact_command_line([word], []) == [word]


@pytest.mark.parametrize(
    "value", ["true-love9", "true,love9", "null love9", "12-love9", "1,love9", "${oc.env:A,love9}", "{a: 5, b: love9}"]
)
def test_a_value_that_only_begins_like_a_number_or_a_word_of_yaml_is_redacted(value: str) -> None:
    assert redact_command_line([f"a.token={value}"], []) == [f"a.token={REDACTED}"]


def test_the_word_after_a_flag_that_names_a_secret_is_redacted() -> None:
    assert redact_command_line(["train.py", "--hf-token", "sEcret1"], []) == ["train.py", "--hf-token", REDACTED]


def test_passwords_in_urls_are_redacted() -> None:
    node = {"url": "https://me:sEcret1@host/a", "more": "http://host?token=sEcret2", "port": "https://host:80/a@b"}
    node |= {"git": "https://sEcret3@host/a", "ssh": "ssh://git@host/a"}
    assert redact_by_key(node) == node | {"url": REDACTED, "more": REDACTED, "git": REDACTED}
    assert set(find_secrets(node)) == {"sEcret1", "sEcret2", "sEcret3"}
    words = ["a=https://me:sEcret1@host", "a=https://sEcret3@host", "a=https://${oc.env:A}@host"]
    assert redact_command_line(words, []) == ["a=https://me:***@host", "a=https://***@host", words[2]]
    kept = {"url": "https://me:${oc.env:PASSWORD}@host"}
    assert redact_by_key(kept) == kept


def test_numbers_under_passwords_are_secrets_and_other_numbers_are_not() -> None:
    node = {"password": 12345678, "num_tokens": 512, "passphrase": True}
    assert redact_by_key(node) == {"password": REDACTED, "num_tokens": 512, "passphrase": True}


def test_short_secrets_and_numbers_are_replaced_as_whole_words() -> None:
    text = "abc of abcd at step 1234, 0.1234, 12345"
    assert replace_secrets(text, ["abc", "1234"]) == f"abc of abcd at step {REDACTED}, 0.1234, 12345"
    assert replace_secrets(text, ["abc"], short=True) == f"{REDACTED} of abcd at step 1234, 0.1234, 12345"


def test_escaped_secrets_are_replaced() -> None:
    secret = 'it\'s a "secret"\nof two lines'
    for text in (secret, repr(secret), secret.replace("\n", "\n  ")):
        assert "secret" not in replace_secrets(text, [secret])
        assert "two lines" not in replace_secrets(text, [secret])


@pytest.mark.parametrize("word", ["token=" + "11," * 5000 + "x", "x" * 100_000, "token=" + "1" * 50_000 + "x"])
def test_long_words_take_little_time(word: str) -> None:
    began = time.monotonic()
    redact_command_line([word], [])
    assert time.monotonic() - began < 2

"""`data=text`: windows of token ids, and the vocabulary of the training part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import ConfigError, DataError
from trainkit.data import text


def test_windows_and_their_targets_are_the_text_in_order(here: Path) -> None:
    (here / "t.txt").write_text("abcabcabd" + "z")
    windows = text("t.txt", length=3)
    inputs, targets = windows.tensors
    assert windows.vocabulary == ["<unk>", "a", "b", "c", "d"]
    read = ["".join(windows.vocabulary[index] for index in row) for row in inputs.tolist()]
    follows = ["".join(windows.vocabulary[index] for index in row) for row in targets.tolist()]
    assert (read, follows) == (["abc", "abc"], ["bca", "bca"])
    assert (inputs.dtype, len(windows.classes)) == (torch.int64, 5)


def test_windows_overlap_by_the_stride(here: Path) -> None:
    (here / "t.txt").write_text("abcdefghij" * 2)
    whole = "abcdefghij" * 2
    windows = text("t.txt", length=4, stride=1, fraction=0.5)
    assert len(windows) == 6
    assert [windows.vocabulary[row[0]] for row in windows.tensors[0].tolist()] == list(whole[:6])


def test_the_last_part_is_the_validation_and_unknown_tokens_have_the_id_0(here: Path) -> None:
    (here / "t.txt").write_text("abababab" + "axab")
    val = text("t.txt", length=3, part="val", fraction=1 / 3)
    assert val.tensors[0].tolist() == [[1, 0, 1]]
    assert val.tensors[1].tolist() == [[0, 1, 2]]


def test_words_are_words_marks_and_line_breaks_and_rare_words_are_unknown(here: Path) -> None:
    (here / "t.txt").write_text("the cat's hat, the hat\nthe cat's end")
    windows = text("t.txt", length=2, unit="words", min_count=2, fraction=0.01)
    assert windows.vocabulary == ["<unk>", "cat's", "hat", "the"]
    (here / "v.txt").write_text("the dog\n")
    val = text("t.txt", length=2, unit="words", part="val", val_file="v.txt")
    assert val.tensors[0].tolist() == [[val.vocabulary.index("the"), 0]]


def test_bytes_need_no_encoding(here: Path) -> None:
    (here / "t.bin").write_bytes(bytes(range(256)) * 2)
    windows = text("t.bin", length=4, unit="bytes", fraction=0.5)
    assert windows.tensors[0][:2].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(windows.classes) == 256


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (b"", {}, "the file is empty"),
        (b"ab\xff", {}, "byte 2 is not UTF-8"),
        (b"abc", {"length": 5}, "the train part has 3 characters, and a window needs 6"),
        (b"abc", {"unit": "word"}, "did you mean data.unit=words"),
        (b"abc", {"length": 0}, "data.length=0: must be 1 or more"),
        (b"abc", {"fraction": 1.5}, "must be between 0 and 1"),
    ],
)
def test_a_wrong_text_is_one_clear_error(content: bytes, arguments: dict[str, int], words: str, here: Path) -> None:
    (here / "t.txt").write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=words):
        text("t.txt", **arguments)  # type: ignore[arg-type]


def test_the_vocabulary_gives_the_model_its_size() -> None:
    session = build_session(compose_settings(["data=text", "model=lstm_lm", "batch_size=4"]))
    assert session.state.model.head.out_features == len(session.train.dataset.vocabulary)
    assert session.settings.data.classes == len(session.train.dataset.vocabulary)

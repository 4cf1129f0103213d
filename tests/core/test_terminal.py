"""Text that is safe for a terminal and a log."""

from __future__ import annotations

import pytest

from trainkit.core.errors import ConfigError, Problem
from trainkit.core.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("val/loss 0.5, naïve ▁▂, a\ttab", "val/loss 0.5, naïve ▁▂, a\ttab"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nerror: forged", r"a\x0aerror: forged"),
        ("a\rb\x9bc", r"a\x0db\x9bc"),
        ("cause\n  its continuation", "cause\n  its continuation"),
        ("right \u202e to left", r"right \u202e to left"),
    ],
)
def test_control_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_a_message_cannot_contain_a_forged_problem() -> None:
    error = ConfigError(Problem("a\nerror: forged", "\x1b[2J"), Problem("second"))
    assert str(error).splitlines() == [r"error: a\x0aerror: forged", r"  \x1b[2J", "error: second"]

"""Text that is safe for a terminal and for a line of a log."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters, and the characters that change the direction of text. A tab is harmless, and a message continues
# in lines that begin with two spaces.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]|\n(?!  )")


def printable(text: str) -> str:
    r"""Return a text with its control characters as escapes such as `\x1b`.

    A file name can contain them, and a terminal would obey them. The text cannot begin a new line either, except a
    continuation that is indented by two spaces.
    """
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1].replace(r"\n", r"\x0a").replace(r"\r", r"\x0d"), text)


def printable_lines(lines: Iterable[str]) -> str:
    """Return lines as one printable text."""
    return "\n".join(map(printable, lines))

"""Read a command line up to the cursor as a shell does, and quote words for bash."""

from __future__ import annotations

import re
from dataclasses import dataclass

SPECIAL = re.compile(r"""([^\w@%+=:,./~^\-])""")  # in an unquoted word of bash
SPECIAL_IN_DOUBLE_QUOTES = re.compile(r'(["\\$`])')


@dataclass(frozen=True)
class Line:
    """A command line up to the cursor.

    Attributes:
        words: the words before the current word, without quotes.
        current: the part of the current word before the cursor, without quotes.
        typed: the same part as it was typed.
        quote: the quotation mark that is open at the cursor, or nothing.
    """

    words: list[str]
    current: str
    typed: str
    quote: str


def read_line(text: str) -> Line:
    """Return the words of a command line. The words before the program, such as `VARIABLE=VALUE`, are left out."""
    words: list[str] = []
    current, quote, start, is_escaped, is_word = "", "", 0, False, False
    for place, letter in enumerate(text):
        if is_escaped:
            keeps_backslash = quote == '"' and letter not in '"\\$`'
            current, is_escaped = current + ("\\" if keeps_backslash else "") + letter, False
        elif letter == "\\" and quote != "'":
            is_escaped = is_word = True
        elif quote:
            quote, current = ("", current) if letter == quote else (quote, current + letter)
        elif letter in "'\"":
            quote, is_word = letter, True
        elif letter.isspace():
            words += [current] if is_word else []
            current, is_word, start = "", False, place + 1
            continue
        else:
            current, is_word = current + letter, True
    while words and re.match(r"\w+=", words[0]):
        del words[0]
    return Line(words[1:], current, text[start:], quote)


def bash_replacement(candidate: str, line: Line, replaced: str) -> str:
    """Return what bash inserts for a candidate.

    Bash replaces only the part of the word after the last of its word breaks, such as `=`.

    Args:
        candidate: the whole word, without quotes.
        line: the command line.
        replaced: the part that bash replaces, as it was typed.
    """
    kept = line.typed.removesuffix(replaced) if line.typed.endswith(replaced) else ""
    rest = candidate[len(read_line(f"trainkit {kept}").current) :] if kept else candidate
    if line.quote == "'":
        return rest.replace("'", "'\\''")
    if line.quote == '"':
        return SPECIAL_IN_DOUBLE_QUOTES.sub(r"\\\1", rest)
    return SPECIAL.sub(r"\\\1", rest)

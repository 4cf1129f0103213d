"""Tables as text: plain, Markdown, LaTeX and CSV. Cells may come from anybody: each format escapes them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from trainkit.core.terminal import printable
from trainkit.display.text import columns

MAX_CELL = 80  # characters of a cell in a plain table
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "…": r"\ldots{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&])")

Cells = Sequence[Sequence[str]]


def plain_table(header: Sequence[str], rows: Cells) -> list[str]:
    """Return lines with aligned columns. Long cells are shortened."""
    return columns([[_shortened(_one_line(cell)) for cell in row] for row in (header, *rows)])


def markdown_table(header: Sequence[str], rows: Cells) -> list[str]:
    """Return the lines of a Markdown table."""
    escaped = [[MARKDOWN.sub(r"\\\1", _one_line(cell)) for cell in row] for row in (header, *rows)]
    return markdown_lines(escaped[0], escaped[1:])


def markdown_lines(header: Sequence[str], rows: Cells) -> list[str]:
    """Return the lines of a Markdown table whose cells are Markdown already."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [lines[0], f"|{' --- |' * len(header)}", *lines[1:]]


def latex_table(header: Sequence[str], rows: Cells) -> list[str]:
    """Return the lines of a LaTeX `tabular`, which needs no package."""
    lines = [rf"{' & '.join(map(latex_text, row))} \\" for row in (header, *rows)]
    begin, end = rf"\begin{{tabular}}{{{'l' * len(header)}}}", r"\end{tabular}"
    return [begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", end]


def latex_text(text: str) -> str:
    """Return a text with the characters escaped that LaTeX interprets."""
    return "".join(LATEX.get(character, character) for character in _one_line(text))


def csv_lines(header: Sequence[str], rows: Cells) -> list[str]:
    """Return the lines of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_one_line(cell) for cell in row] for row in (header, *rows)])
    return text.getvalue().splitlines()


def _one_line(text: str) -> str:
    return printable(text).replace("\n", r"\x0a").replace("\t", " ")


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"

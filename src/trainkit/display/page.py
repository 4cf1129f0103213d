"""A self-contained HTML page: every text is escaped, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from trainkit.core.terminal import CONTROL, printable

HERE = Path(__file__).parent
# The browser itself refuses every request, whatever a file of a run contains.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
CUT = 400  # characters of a cell of a table
TALL = 30  # rows of a table that scrolls in its own box
SHORT = 30  # characters of a cell that stays on one line
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.e+-]+)?|nan|-?inf")


@dataclass(frozen=True)
class Html:
    """Text that is HTML already. All other text is escaped."""

    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is sorted by another value than its text."""

    content: str | Html
    sort: float | None = None


Content = str | Html | Cell


def text(content: Any) -> str:
    """Return escaped text. Control characters appear as escapes, except line ends and tabs."""
    if isinstance(content, Html):
        return content.text
    if isinstance(content, Cell):
        return text(content.content)
    lines = str(content).split("\n")
    return escape("\n".join(CONTROL.sub(lambda found: ascii(found[0])[1:-1], line) for line in lines))


def page(title: str, parts: Iterable[Html]) -> str:
    """Return a whole page.

    Args:
        title: the title of the browser's tab.
        parts: the content, in order.
    """
    body = "\n".join(part.text for part in parts)
    whole = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(printable(title))}</title>
<link rel="icon" href="data:,">
<style>
{_file("report.css")}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{_file("report.js")}</script>
</body>
</html>
"""
    return whole.encode(errors="replace").decode()  # a file may contain halves of characters


@cache
def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def section(heading: str, *parts: Html) -> Html:
    """Return a section with a heading; nothing if it has no content."""
    body = "\n".join(part.text for part in parts if part.text)
    return Html(f"<section>\n<h2>{text(heading)}</h2>\n{body}\n</section>" if body else "")


def element(tag: str, content: Content, **attributes: str) -> Html:
    """Return an element. The attribute `class` is written `class_`."""
    given = "".join(f' {name.rstrip("_")}="{text(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{text(content)}</{tag}>")


def join(parts: Iterable[Html], separator: str = "\n") -> Html:
    """Return several parts as one."""
    return Html(separator.join(part.text for part in parts))


def tiles(numbers: Mapping[str, tuple[str, str]]) -> Html:
    """Return headline numbers: label -> (number, a note below it)."""
    items = [
        f"<div><dt>{text(label)}</dt><dd>{text(value)}</dd>" + (f"<dd>{text(note)}</dd>" if note else "") + "</div>"
        for label, (value, note) in numbers.items()
    ]
    return Html('<dl class="tiles">' + "".join(items) + "</dl>" if items else "")


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Content]], *, sortable: bool = False) -> Html:
    """Return a table in a box that scrolls. The first cell of a row is its heading.

    Args:
        caption: what the table shows.
        header: the names of the columns.
        rows: the cells.
        sortable: let a click on a column sort the rows.
    """
    if not rows:
        return Html("")
    numeric = [_is_numeric([row[place] for row in rows]) for place in range(len(header))]
    kinds = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    names = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    lines = []
    for row in rows:
        cells = zip(row, kinds, strict=True)
        lines.append("".join(_cell(cell, kind, heading=not place) for place, (cell, kind) in enumerate(cells)))
    label, body = text(caption), "\n".join(f"<tr>{line}</tr>" for line in lines)
    kind, tall = ' class="sortable"' if sortable else "", " tall" if len(rows) > TALL else ""
    return Html(
        f'<div class="scroll{tall}" role="region" aria-label="{label}" tabindex="0"><table{kind}>'
        f"<caption><span>{label}</span></caption>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _is_numeric(column: Sequence[Content]) -> bool:
    """Return whether a column holds numbers, and perhaps empty cells. Numbers are right-aligned."""
    shown = [cell.content if isinstance(cell, Cell) else cell for cell in column]
    return any(shown) and all(not cell or (isinstance(cell, str) and NUMBER.fullmatch(cell)) for cell in shown)


def _cell(cell: Content, kind: str, *, heading: bool) -> str:
    order, content = "", cell.content if isinstance(cell, Cell) else cell
    if isinstance(cell, Cell) and cell.sort is not None:
        order = f' data-sort="{cell.sort!r}"'
    if isinstance(content, str) and len(content) > CUT:
        content = f"{content[:CUT]}…"
    if not kind and isinstance(content, str) and len(content) <= SHORT:
        kind = ' class="short"'
    return f'<th scope="row"{kind}{order}>{text(content)}</th>' if heading else f"<td{kind}{order}>{text(content)}</td>"


def details(summary: str, content: Html, *, is_open: bool = False) -> Html:
    """Return a part that is folded until it is opened; nothing if it has no content."""
    state = " open" if is_open else ""
    return Html(
        f"<details{state}><summary>{text(summary)}</summary>\n{content.text}\n</details>" if content.text else ""
    )


def listing(lines: Iterable[str], kind: str = "") -> Html:
    """Return lines as a list; nothing if there are none."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return Html(f'<ul class="{kind}">{items}</ul>' if items else "")


def verbatim(content: str, label: str) -> Html:
    """Return text as it is, in a box that scrolls; nothing if it is empty."""
    box = f'<pre class="scroll" role="region" aria-label="{text(label)}" tabindex="0">{text(content)}</pre>'
    return Html(box if content.strip() else "")

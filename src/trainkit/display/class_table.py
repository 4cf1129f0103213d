"""The table of the classes of an evaluation, and the picture of its confusion matrix. Nothing here imports torch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.core.terminal import printable
from trainkit.display.plots import new_figure
from trainkit.display.tables import plain_table
from trainkit.display.text import number

MEASURES = ("precision", "recall", "f1")
MAX_ROWS = 50  # classes in a table
WORST_ROWS = 20  # classes in the table of more classes
MAX_NAME = 24  # characters of a class in the picture
MAX_COUNTED = 30  # classes whose cells show their counts
MAX_LABELS = 120  # classes with their names at the axes
INCHES = 0.18  # of a cell without its count


def class_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the table of the classes, with their averages.

    Of many classes, those with the lowest F1 are shown.

    Args:
        found: what `ClassCounts.compute` returns.
    """
    classes = found["classes"]
    shown = classes
    if len(classes) > MAX_ROWS:
        shown = sorted((row for row in classes if row["samples"]), key=lambda row: row["f1"])[:WORST_ROWS]
    header = ["class", "samples", *MEASURES, "accuracy"]
    rows = [
        [str(row["class"]), f"{row['samples']:,}", *(number(row[key]) for key in (*MEASURES, "accuracy"))]
        for row in shown
    ]
    total = f"{sum(row['samples'] for row in classes):,}"
    for name, text in (("macro", "mean of the classes"), ("weighted", "weighted by samples")):
        values = [found[name][key] for key in MEASURES]
        rows.append([text, total, *("" if value is None else number(value) for value in values), ""])
    lines = plain_table(header, rows)
    if shown is not classes:
        lines.append(f"shown: the {len(shown)} classes with the lowest f1, of {len(classes):,}")
    return lines


def draw_confusion_matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """Return a confusion matrix as a PNG file. The color of a cell is its share of the row, the true class.

    Args:
        matrix: counts, a row for each true class and a column for each predicted class.
        names: of the classes.
    """
    count = len(names)
    labels = [_short(name) for name in names]
    longest = max(map(len, labels))
    side = max(3.2, INCHES * min(count, MAX_LABELS) * (2.3 if count <= MAX_COUNTED else 1.0))
    figure, axes = new_figure(side + 1.0 + 0.07 * longest, width=side + 2.0 + 0.07 * longest)
    shares = [[cell / max(1, sum(row)) for cell in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    every = -(-count // MAX_LABELS)
    size = 9 if count <= MAX_COUNTED else 7
    ticks = range(0, count, every)
    axes.set_xticks(ticks, labels[::every], rotation=90 if longest > 2 else 0, fontsize=size)
    axes.set_yticks(ticks, labels[::every], fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)  # a name may contain $
    if count <= MAX_COUNTED:
        for i, row in enumerate(matrix):
            for j, cell in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black" if cell else "0.7"
                axes.text(j, i, f"{cell}", ha="center", va="center", color=color, fontsize=_cell_size(cell))
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8, fraction=0.05, pad=0.02)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the characters of a name
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _short(name: str) -> str:
    text = printable(str(name)) or "''"
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def _cell_size(cell: int) -> float:
    """Return the font size of a count, so that it fits into its cell."""
    return 8.0 if cell < 1000 else 6.5 if cell < 100_000 else 5.0

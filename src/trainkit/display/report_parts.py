"""What the reports of a run and of a sweep have in common."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from trainkit.display.charts import DASHES, MAX_CHARTS, SERIES, Chart, Drawing, draw_svg
from trainkit.display.page import Cell, Content, Html, element, listing, text
from trainkit.display.text import count, number

MAX_ROWS = 1000  # of a table


def metric_cell(value: Any) -> Content:
    """Return the cell of a metric, which is sorted by its exact value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    return Cell(f"{value:,}" if isinstance(value, int) else number(value), float(value))


def chart_section(charts: Sequence[Chart], *, shared_legend: bool = False) -> Html:
    """Return the charts.

    Args:
        charts: in their order.
        shared_legend: show one legend for all of them, that of the chart with the most curves.
    """
    shown = charts[:MAX_CHARTS]
    legends = [_legend(chart) for chart in shown]
    shared = max(legends, key=len, default="") if shared_legend else ""
    figures = [
        f"<figure><h3>{text(chart.title)}</h3>{'' if shared else legend}{draw_svg(chart, index)}</figure>"
        for index, (chart, legend) in enumerate(zip(shown, legends, strict=True), 1)
    ]
    left = len(charts) - len(shown)
    more = element("p", f"{count(left, 'more metric')}: see the table of the epochs.") if left > 0 else Html("")
    return Html(f'{shared}<div class="charts">{"".join(figures)}</div>{more.text}' if figures else "")


def drawing_section(drawings: Sequence[Drawing], start: int, *, wide: bool = False) -> Html:
    """Return drawings side by side.

    Args:
        drawings: in their order.
        start: the number in the page of the first one.
        wide: give each the whole width.
    """
    figures = [
        f"<figure><h3>{text(drawing.title)}</h3>{draw_svg(drawing, number_in_page)}</figure>"
        for number_in_page, drawing in enumerate(drawings, start)
    ]
    kind = "wide" if wide else "charts"
    return Html(f'<div class="{kind}">{"".join(figures)}</div>' if figures else "")


def _legend(chart: Chart) -> str:
    items = [f"<li>{swatch(curve.place)}{text(curve.name)}</li>" for curve in chart.curves if not curve.is_grey]
    grey = sum(curve.is_grey for curve in chart.curves)
    items += [f"<li>{swatch(len(SERIES))}{count(grey, 'other')}</li>"] if grey else []
    return f'<ul class="legend">{"".join(items)}</ul>'


def swatch(place: int) -> str:
    """Return a short line in the colour and the dashes of a curve."""
    is_grey = place >= len(SERIES)
    color = "muted" if is_grey else f"c{place + 1}"
    dashes = "" if is_grey else " ".join(f"{2 * length:g}" for length in DASHES[place % len(DASHES)])
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<path d="M0 4h26" style="stroke:var(--{color})"{dashed}/>'
    return f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true">{line}</svg>'


def missing_lines(lines: Sequence[str]) -> Html:
    """Return what is missing or damaged as a list."""
    return listing([f"missing or damaged: {line}" for line in lines], "lines missing")


def first_rows(total: int) -> str:
    """Return a note for a caption if a table has more rows than are shown."""
    return f" (the first {MAX_ROWS:,} of {total:,})" if total > MAX_ROWS else ""


def footer() -> Html:
    """Return when the page was written."""
    now = datetime.datetime.now(datetime.UTC)
    return element("footer", f"Written by trainkit report on {now:%Y-%m-%d at %H:%M} UTC.")

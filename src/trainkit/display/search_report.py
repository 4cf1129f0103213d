"""What the report of a sweep adds for a search, from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainkit.display.charts import SERIES
from trainkit.display.page import Html, element, join, listing, section, text
from trainkit.display.parallel_coordinates import MAX_AXES, count_best, parallel_coordinates
from trainkit.display.report_parts import drawing_section
from trainkit.display.search_charts import (
    OTHER,
    STYLES,
    SampledKey,
    Style,
    TrialFacts,
    best_by_epochs,
    best_by_trial,
    importance_bars,
    intermediate_values,
    value_by_key,
)

CHARTS_BEFORE = 100  # the numbers in the page of the charts of a sweep
INK = "ink"


@dataclass(frozen=True)
class SearchFacts:
    """What the files of a search say.

    Attributes:
        name: of the search; '' if the page has one search.
        metric: the monitored metric.
        mode: `min` or `max`.
        lines: what the search has found.
        command: that repeats the best setting; '' if there is none.
        trials: the best first, then those that are not compared.
        keys: that are sampled.
        steps: the epochs of all trials with the best value so far.
        importance: the share of each key.
        importance_note: how the importance was computed, or why it is missing.
        saved: the epochs that pruning has saved, and a note; empty if the search stops no trial early.
    """

    name: str = ""
    metric: str = ""
    mode: str = "min"
    lines: Sequence[str] = ()
    command: str = ""
    trials: Sequence[TrialFacts] = ()
    keys: Sequence[SampledKey] = ()
    steps: Sequence[tuple[float, float]] = ()
    importance: Mapping[str, float] = field(default_factory=dict)
    importance_note: str = ""
    saved: tuple[str, str] | None = None


def search_sections(facts: SearchFacts, place: int) -> Html:
    """Return the sections of a search.

    Args:
        facts: of the search.
        place: of the search in the page, from 0.
    """
    start = CHARTS_BEFORE * (place + 1)
    of = f" of {facts.name}" if facts.name else ""
    command = [element("p", "The command that repeats the best setting:")] * bool(facts.command)
    command += [element("pre", facts.command, class_="command")] * bool(facts.command)
    parts = [section(f"Search{of}", listing(facts.lines, "lines"), *command)]
    if any(trial.value is not None for trial in facts.trials):
        parts += _charts(facts, start, of)
    return join(part for part in parts if part.text)


def _charts(facts: SearchFacts, start: int, of: str) -> list[Html]:
    history = [best_by_trial(facts.trials, facts.metric, facts.mode)]
    history += [best_by_epochs(facts.steps, facts.metric)] if facts.steps else []
    history += [intermediate_values(facts.trials, facts.metric)]
    parts = [section(f"Trials{of}", status_legend(facts.trials), drawing_section(history, start))]
    if not facts.keys:
        return parts
    drawings = [value_by_key(facts.trials, key, facts.metric, facts.mode) for key in facts.keys[:MAX_AXES]]
    drawings += [importance_bars(facts.importance)] if facts.importance else []
    note = element("p", facts.importance_note, class_="soft") if facts.importance_note else Html("")
    wide = parallel_coordinates(facts.trials, facts.keys, facts.metric, facts.mode)
    return [
        *parts,
        section(
            f"Sampled keys{of}",
            status_legend(facts.trials, with_best=False),
            drawing_section(drawings, start + 10),
            note,
            _legend(_lines_of_trials(facts.trials)),
            drawing_section([wide], start + 50, wide=True),
        ),
    ]


def _lines_of_trials(trials: Sequence[TrialFacts]) -> list[tuple[str, str]]:
    """Return the legend of the parallel coordinates."""
    best = count_best(trials)
    legend = [("the best trial", _line(INK, ()))]
    legend += [(f"the best {best} trials", _line("c1", ()))] if best > 1 else []
    return [
        *legend,
        ("other trials", _line("muted", ())),
        ("dashed or dotted: stopped early", _line("muted", STYLES["paused"].dashes)),
    ]


def status_legend(trials: Sequence[TrialFacts], *, with_best: bool = True) -> Html:
    """Return the legend of the statuses that the trials have.

    Args:
        trials: of the search.
        with_best: add the line of the best value.
    """
    found = {trial.status for trial in trials if trial.value is not None or trial.curves}
    items = [(status, _swatch(style)) for status, style in STYLES.items() if status in found]
    items += [("other", _swatch(OTHER))] if found - STYLES.keys() else []
    return _legend([*items, *[("best", _line(INK, ()))] * with_best])


def _legend(items: Sequence[tuple[str, str]]) -> Html:
    listed = "".join(f"<li>{swatch}{text(name)}</li>" for name, swatch in items)
    return Html(f'<ul class="legend">{listed}</ul>')


def _swatch(style: Style) -> str:
    """Return the line and the marker of a status."""
    color = f"c{SERIES.index(style.color) + 1}" if style.color in SERIES else "muted"
    cross = {"x": "M10 1l6 6m0 -6l-6 6", "+": "M13 0v8m-4 -4h8"}.get(style.marker)
    inside = "paper" if style.is_hollow else color
    marker = f'<circle cx="13" cy="4" r="3" style="fill:var(--{inside});stroke:var(--{color})"/>'
    return _line(color, style.dashes, f'<path d="{cross}" style="stroke:var(--{color})"/>' if cross else marker)


def _line(color: str, dashes: Sequence[float], more: str = "") -> str:
    dashed = f' stroke-dasharray="{" ".join(f"{length:g}" for length in dashes)}"' if dashes else ""
    line = f'<path d="M0 4h26" style="stroke:var(--{color})"{dashed}/>'
    return f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true">{line}{more}</svg>'

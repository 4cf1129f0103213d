"""Reports from plain data: charts, escaping, and pages that load nothing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from trainkit.display.charts import MAX_CHARTS, SERIES, Chart, describe, draw_png, draw_svg, job_charts, run_charts
from trainkit.display.page import page, table
from trainkit.display.run_report import RunFacts, run_page
from trainkit.display.sweep_report import JobFacts, SweepFacts, sweep_page

HOSTILE = "</script><script>alert(1)</script>\"'><img src=//evil.example/x onerror=alert(2)>\x1b[31m\ud800$\\frac{"


def history(**metrics: list[Any]) -> list[dict[str, Any]]:
    """Return the rows of a history from the values of each metric."""
    length = len(next(iter(metrics.values())))
    return [{"epoch": i + 1, **{name: values[i] for name, values in metrics.items()}} for i in range(length)]


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_safe(text: str) -> None:
    """Check that a page runs no script but its own, and refers to nothing outside of it."""
    elements = Elements(text).found
    assert [tag for tag, _ in elements].count("script") == 1
    assert not {"img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert "src" not in attributes
        link = attributes.get("href") or "#"
        assert link.startswith(("#", "./", "data:")), link
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style


def hostile_run() -> RunFacts:
    """Return a run whose every text is hostile."""
    options = {HOSTILE: HOSTILE}
    row = {"name": HOSTILE, "aliases": [HOSTILE], "shape": [1], "count": 1, "group": HOSTILE, "optimizer": HOSTILE}
    return RunFacts(
        name=HOSTILE,
        info={"status": HOSTILE, "why": HOSTILE, "command": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "host": HOSTILE},
        history=history(**{f"val/{HOSTILE}": [1.0, 2.0], f"_{HOSTILE}": [1.0, math.inf]}),
        params=[row | {"options": options, "decided_by": options}],
        overrides=[HOSTILE],
        config=HOSTILE,
        base=HOSTILE,
        differences=[(HOSTILE, HOSTILE, HOSTILE)],
        log=[f"time note: {HOSTILE}"],
        missing=[HOSTILE],
    )


def hostile_sweep() -> SweepFacts:
    """Return a sweep whose every text is hostile."""
    rows = history(**{HOSTILE: [1.0, 2.0]})
    job = JobFacts(
        HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, {HOSTILE: 1.0}, history=rows, link="./x/", why=HOSTILE, tail=[HOSTILE]
    )
    return SweepFacts(HOSTILE, [job], HOSTILE, ([HOSTILE], [[HOSTILE]]), [HOSTILE], [HOSTILE])


def test_training_and_validation_share_a_chart_and_every_metric_has_one() -> None:
    rows = history(
        **{"train/loss": [2.0, 1.0], "val/loss": [2.0, 1.5], "val/accuracy": [0.1, 0.2], "lr/a": [1.0, 1.0]},
        **{"lr/b": [2.0, 2.0], "mine/score": [1.0, 2.0], "train/f1": [0.0, 1.0], "val/f1": [0.0, 1.0]},
        **{"seconds": [1.0, 1.0], "samples_per_second": [9.0, 9.0], "step": [3.0, 6.0]},
    )
    charts = {chart.title: [curve.name for curve in chart.curves] for chart in run_charts(rows)}
    assert charts == {
        "loss": ["train/loss", "val/loss"],
        "accuracy": ["val/accuracy"],
        "learning rate": ["lr/a", "lr/b"],
        "f1": ["train/f1", "val/f1"],
        "mine/score": ["mine/score"],
    }


def test_lists_and_matrices_of_the_best_epoch_are_tables() -> None:
    values: dict[str, list[Any]] = {"val/f1": [[0.1, 0.2], [0.3, 0.4]]}
    rows = history(**values, **{"val/confusion": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]})
    text = run_page(RunFacts("run", info={"best": {"metric": "val/loss", "value": 1.0, "epoch": 1}}, history=rows))
    assert "val/confusion of epoch 1</span></caption>" in text
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text.partition("Metrics with several values")[2])
    assert cells[:6] == ["metric", "0", "1", "val/f1", "0.1000", "0.2000"]
    assert cells[6:15] == ["row", "0", "1", "0", "1", "2", "1", "3", "4"]


def test_the_best_epoch_is_marked_on_the_chart_of_the_monitored_metric() -> None:
    rows = history(**{"val/loss": [2.0, 1.0, 3.0], "val/accuracy": [0.1, 0.2, 0.3]})
    loss, accuracy = run_charts(rows, {"metric": "val/loss", "value": 1.0, "epoch": 2})
    assert (loss.best, accuracy.best) == ((2, 1.0), None)
    assert "<use " in draw_svg(loss, 1)
    assert "<use " not in draw_svg(accuracy, 1)


def test_a_job_keeps_its_colour_in_every_chart_and_jobs_without_a_colour_are_grey() -> None:
    jobs = [
        (f"job {i}", history(**{"val/loss": [1.0, 0.5], **({"val/f1": [0.0, 1.0]} if i else {})})) for i in range(9)
    ]
    loss, f1 = job_charts(jobs, ["val/loss", "val/f1", "absent"])
    assert {curve.name: curve.place for curve in loss.curves}.items() >= {c.name: c.place for c in f1.curves}.items()
    assert [curve.is_grey for curve in loss.curves] == [False] * len(SERIES) + [True]


def test_the_same_history_gives_the_same_svg_with_variables_as_colours_and_no_address() -> None:
    chart = run_charts(history(**{"train/loss": [3.0, 2.0], "val/loss": [3.0, 2.5]}))[0]
    svg = draw_svg(chart, 1)
    assert svg == draw_svg(chart, 1)
    assert not re.search("#[0-9a-fA-F]{3,8}\\b|http|www|font-family|<style", svg)
    assert {"var(--ink)", "var(--line)", "var(--c1)", "var(--c2)"} <= set(re.findall(r"var\(--\w+\)", svg))
    ids = re.findall(r' id="([^"]*)"', draw_svg(chart, 7))
    assert ids
    assert all(name.startswith("f7-") for name in ids)


def test_a_chart_has_a_description_in_words() -> None:
    chart = run_charts(history(**{"train/loss": [3.0, 2.0], "val/loss": [math.nan, math.nan]}))[0]
    assert describe(chart) == "loss by epoch: train/loss from 3.0000 to 2.0000; val/loss without a finite value"
    assert f'role="img" aria-label="{describe(chart)}"' in draw_svg(chart, 1)


@pytest.mark.parametrize(
    "values",
    [[1.0], [math.nan], [math.inf, 1.0], [1e308, -1e308], [0.0, 0.0], [1e-30, 1.0], [5.0, 5.0], [1, 10**200]],
    ids=str,
)
def test_values_of_any_size_can_be_drawn(values: list[float]) -> None:
    charts = run_charts(history(**{"train/loss": values}), {"metric": "train/loss", "epoch": 1, "value": values[0]})
    assert draw_svg(charts[0], 1).startswith("<svg")
    assert draw_png(charts).startswith(b"\x89PNG")
    assert "train/loss" in run_page(RunFacts("run", history=history(**{"train/loss": values})))


def test_a_sweep_over_many_magnitudes_gets_a_logarithmic_axis_with_plain_numbers() -> None:
    svg = draw_svg(Chart("loss", run_charts(history(**{"val/loss": [1000.0, 0.1]}))[0].curves), 1)
    assert {"0.1", "10", "1000"} <= set(re.findall(r">([\d.]+)</text>", svg))


def test_hostile_texts_of_a_run_stay_text() -> None:
    assert_safe(run_page(hostile_run()))
    assert draw_png(hostile_run().charts).startswith(b"\x89PNG")


def test_hostile_texts_of_a_sweep_stay_text() -> None:
    assert_safe(sweep_page(hostile_sweep()))
    assert draw_png(hostile_sweep().charts).startswith(b"\x89PNG")


def test_a_page_forbids_requests_and_needs_no_file() -> None:
    text = page("title", [])
    assert_safe(text)
    policies = [a["content"] for tag, a in Elements(text).found if "Content-Security-Policy" in a.values()]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none';")
    assert '<link rel="icon" href="data:,">' in text
    assert "http" not in text.replace("http-equiv", "")


def luminance(color: str) -> float:
    """Return the relative luminance of a colour such as `#2a6fdb`, as WCAG defines it."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_and_curves_stand_out_from_their_background_in_light_dark_and_print() -> None:
    style = page("", []).partition("<style>")[2].partition("</style>")[0]
    themes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(themes) == 3
    for colors in themes:
        curves = [f"c{place}" for place in range(1, len(SERIES) + 1)]
        for name in ("ink", "soft", "link", "good", "bad", *curves):
            for background in ("paper", "card"):
                dark, light = sorted(luminance(colors[key]) for key in (name, background))
                assert (light + 0.05) / (dark + 0.05) >= (3 if name in curves else 4.5), (name, background)
    assert [themes[0][f"c{place}"] for place in range(1, len(SERIES) + 1)] == list(SERIES)


def test_tables_have_a_caption_scopes_and_a_box_that_scrolls() -> None:
    text = table("what it shows", ["name", "value", "text"], [["a", "1,234.5", "x"], ["b", "0.1 ± 0.02", "2"]]).text
    assert '<th scope="col" class="number">value</th>' in text
    assert '<th scope="row" class="short">a</th><td class="number">1,234.5</td><td class="short">x</td>' in text
    assert '<div class="scroll" role="region" aria-label="what it shows" tabindex="0">' in text
    assert "what it shows</span></caption>" in text


@pytest.mark.slow
def test_charts_beyond_the_limit_are_counted() -> None:
    rows = history(**{f"metric{i}": [1.0, 2.0] for i in range(MAX_CHARTS + 3)})
    text = run_page(RunFacts("run", history=rows))
    assert text.count('<svg class="chart"') == MAX_CHARTS
    assert "3 more metrics" in text


def test_an_empty_run_and_an_empty_sweep_have_a_report() -> None:
    assert_safe(run_page(RunFacts("run", missing=["run.json"])))
    assert_safe(sweep_page(SweepFacts("sweep")))

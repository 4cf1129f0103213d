"""The reports in a headless Chromium: tables, curves, sorting, and no request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, find_browser
from tests.saved_runs import save_run, save_sweep
from tests.sweeps.made_searches import make_search, random_trials
from trainkit.engine.report import write_run_report
from trainkit.sweeps.report import write_sweep_report

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium was found: see CONTRIBUTING.md"),
]
HEADERS = "[...document.querySelectorAll('table.sortable')].at(-1).tHead.rows[0].cells"
COLUMN = "[...[...document.querySelectorAll('table.sortable')].at(-1).tBodies[0].rows].map(r => r.cells[{}].innerText)"
# Each curve has a shape on the screen.
CURVES = "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width > 200)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LINE_COLOR = "getComputedStyle(document.querySelector('svg.chart path[style*=\"--c1\"]')).stroke"
REPEATED_IDS = "(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser."""
    assert PROGRAM is not None
    started = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def run_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run."""
    return write_run_report(save_run(tmp_path_factory.mktemp("runs") / "run").directory)


@pytest.fixture(scope="module")
def sweep_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep."""
    return write_sweep_report(save_sweep(tmp_path_factory.mktemp("sweeps") / "sweep"))


@pytest.fixture(scope="module")
def search_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a search with 40 trials."""
    return write_sweep_report(make_search(tmp_path_factory.mktemp("searches") / "search", random_trials(40)))


def open_page(browser: Browser, report: Path) -> None:
    """Open a report; check that it makes no request besides itself, and that the console is empty."""
    browser.emulate()
    browser.open(report.as_uri())
    assert browser.requests == [report.as_uri()]
    assert browser.problems == []
    assert browser.evaluate(REPEATED_IDS) == 0


def test_the_report_of_a_run_shows_its_tables_and_curves(browser: Browser, run_report: Path) -> None:
    open_page(browser, run_report)
    assert browser.evaluate(CURVES) == [True] * 4
    captions = browser.evaluate("[...document.querySelectorAll('caption')].map(c => c.textContent)")
    assert {"Metrics of each epoch", "What differs from the defaults of its choices"} <= set(captions)
    assert browser.evaluate("document.querySelectorAll('h1').length") == 1
    assert browser.evaluate("document.querySelector('h1').innerText").endswith("run")


def test_a_click_on_a_column_sorts_the_jobs_and_a_second_one_reverses(browser: Browser, sweep_report: Path) -> None:
    open_page(browser, sweep_report)
    assert browser.evaluate(CURVES) == [True] * 3
    names = browser.evaluate(f"[...{HEADERS}].map(h => h.innerText)")
    for name, ascending in (
        ("val/loss", ["0.2000", "0.4000", "0.9000", ""]),  # a job without a value stays last
        ("job", ["0", "1", "2", "3"]),
        ("lr", ["0.01", "0.01", "0.1", "0.1"]),
        ("time", ["2.0 s", "3.0 s", "4.0 s", "5.0 s"]),
        ("status", ["completed", "completed", "completed", "failed"]),
    ):
        place = names.index(name)
        column, click = COLUMN.format(place), f"{HEADERS}[{place}].querySelector('button').click()"
        browser.evaluate(click)
        assert browser.evaluate(column) == ascending
        assert browser.evaluate(f"{HEADERS}[{place}].getAttribute('aria-sort')") == "ascending"
        browser.evaluate(click)
        values = [value for value in ascending if value]
        assert browser.evaluate(column) == values[::-1] + [""] * (len(ascending) - len(values))
    assert browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
    assert browser.problems == []


def test_the_report_of_a_search_shows_its_charts(browser: Browser, search_report: Path) -> None:
    open_page(browser, search_report)
    assert browser.evaluate(CURVES) == [True] * 10
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings == ["Search", "Trials", "Sampled keys", "Comparison", "Learning curves"]
    assert browser.evaluate("document.querySelectorAll('svg.chart:not([aria-label])').length") == 0


def test_both_reports_are_dark_where_the_user_prefers_it_and_light_on_paper(
    browser: Browser, run_report: Path, sweep_report: Path
) -> None:
    for report in (run_report, sweep_report):
        open_page(browser, report)
        light = browser.evaluate(f"[{BACKGROUND}, {LINE_COLOR}]")
        browser.emulate(dark=True)
        dark = browser.evaluate(f"[{BACKGROUND}, {LINE_COLOR}]")
        browser.emulate(dark=True, media="print")
        assert browser.evaluate(f"[{BACKGROUND}, {LINE_COLOR}]") == light
        assert light[0] == "rgb(255, 255, 255)"
        assert light[0] != dark[0]
        assert light[1] != dark[1]
        assert browser.pdf().startswith(b"%PDF")


def test_the_page_itself_does_not_scroll_sideways_on_a_phone(
    browser: Browser, run_report: Path, sweep_report: Path, search_report: Path
) -> None:
    for report in (run_report, sweep_report, search_report):
        open_page(browser, report)
        browser.emulate(width=360, height=740)
        assert browser.evaluate(OVERFLOW) == 0


def test_unfolded_tables_fit_on_paper(
    browser: Browser, run_report: Path, sweep_report: Path, search_report: Path
) -> None:
    for report in (run_report, sweep_report, search_report):
        open_page(browser, report)
        browser.emulate(width=720, media="print")  # A4 without its margins
        browser.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert browser.evaluate("document.querySelectorAll('details:not([open])').length") == 0
        assert browser.evaluate(OVERFLOW) == 0


def test_without_a_script_the_tables_are_plain_tables(browser: Browser, sweep_report: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, sweep_report)
        assert browser.evaluate("document.querySelectorAll('table.sortable tbody tr').length") == 6
        assert browser.evaluate("document.querySelectorAll('th button').length") == 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_policy_of_the_page_refuses_a_request(browser: Browser, run_report: Path) -> None:
    open_page(browser, run_report)
    script = "new Promise(done => { let i = new Image(); i.onerror = () => done('refused'); i.src = 'file:///x' })"
    assert browser.evaluate(script) == "refused"
    assert any("Content Security Policy" in problem for problem in browser.problems)

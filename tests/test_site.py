"""The documentation builds as a site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = (sys.executable, "-m", "mkdocs", "build")  # with --quiet, strict mode does not count the warnings
PLAIN_LIST = re.compile(r"(?:<p>|\n)(?:- |\d+\. |\|).*")


def build(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Build the site into a folder."""
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [*MAKE, "--site-dir", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of each page of the site, by name."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {file.parent.name: file.read_text() for file in folder.glob("*/index.html")}


def test_the_site_has_every_page_and_no_link_that_leads_nowhere(pages: dict[str, str]) -> None:
    # Strict mode: a missing page, file or heading ends the build with an error.
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= set(pages)


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n[a](missing.md) [b](#missing)\n")
    settings = re.sub(r"^nav:.*", "", (ROOT / "mkdocs.yml").read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    assert "missing.md" in done.stderr
    assert "#missing" in done.stderr


def test_lists_and_tables_are_rendered(pages: dict[str, str]) -> None:
    plain = {name: PLAIN_LIST.findall(article(html)) for name, html in pages.items()}
    assert {name: found for name, found in plain.items() if found} == {}


def test_a_page_loads_nothing_from_another_site(pages: dict[str, str]) -> None:
    for name, html in pages.items():
        assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\"> ]*)", html) == [], name


def article(html: str) -> str:
    """Return the text of a page, without navigation and code."""
    return re.sub(r"<pre>.*?</pre>", "", html.partition("<article")[2].partition("</article>")[0], flags=re.DOTALL)

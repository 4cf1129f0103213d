"""The links, code blocks and dotted paths in the docs are right."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs_pages import Command, steps
from trainkit.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$", re.MULTILINE | re.DOTALL)
DOTTED = re.compile(r"\btrainkit(?:\.[A-Za-z_]\w*)+")
FILES = {"trainkit.log", "trainkit.schema.json"}


@cache
def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    broken = []
    for link in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):  # an address
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(path.resolve())):
            broken.append(link)
    return broken


def page_name(page: Path) -> str:
    """Return the path of a page in the repository."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, with `code`\n[a](page.md#a-heading-with-code) [b](page.md#b) [c](c.md) [d](#e)\n")
    assert broken_links(page) == ["page.md#b", "c.md", "#e"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_code_block_is_of_a_known_kind(page: Path) -> None:
    steps(page.read_text())  # tests/test_docs_commands.py runs them


def test_every_task_has_a_command() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "tasks.md").read_text(), flags=re.M)[1:]
    without = [text.splitlines()[0] for text in sections if not any(isinstance(s, Command) for s in steps(text))]
    assert without == ["How a model is called"]


def test_the_docs_show_every_command() -> None:
    lines = " ".join(step.line for page in PAGES for step in steps(page.read_text()) if isinstance(step, Command))
    assert [name for name in COMMANDS if name != "train" and f"trainkit {name}" not in lines] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_name)
def test_every_dotted_path_of_trainkit_can_be_imported(page: Path) -> None:
    missing = [dotted for dotted in DOTTED.findall(page.read_text()) if dotted not in FILES and not exists(dotted)]
    assert missing == []


@cache
def exists(dotted: str) -> bool:
    """Return whether a dotted path names a module, or an attribute of a module or class."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        try:
            for name in parts[count:]:
                found = getattr(found, name)
        except AttributeError:
            return False
        return True
    return False


def traced_functions() -> list[str]:
    """Return the dotted paths of the functions in the trace of a training in docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = page.partition("## One training")[2].partition("\n## ")[0].splitlines()
    found, module = [], ""
    for row in rows:
        cells = row.split("|")
        if len(cells) > 3 and "`" in cells[2]:
            module = cells[1].strip(" `").replace("/", ".") or module
            found += [f"trainkit.{module}.{name}" for name in re.findall(r"`([\w.]+)`", cells[2])]
    return found


def test_every_function_in_the_trace_of_the_architecture_exists() -> None:
    assert len(traced_functions()) > 30
    assert [dotted for dotted in traced_functions() if not exists(dotted)] == []


def test_every_file_in_the_architecture_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = re.findall(r"`((?:[a-z_]+/)+\w+\.(?:py|yaml))`", page)
    folders = (ROOT, ROOT / "src" / "trainkit")
    existing = [file for file in files if any((folder / file).is_file() for folder in folders)]
    assert [file for file in files if file not in existing and "NAME" not in file] == []

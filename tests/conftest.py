"""Fixtures: the installed command and an empty folder to run it in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Forks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; torch reads this when it is imported

# The modules with the longest slow tests.
LONGEST = ("test_exactness.py", "test_docs_commands.py", "test_install.py")

Command = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = Path(sys.executable).with_name("trainkit")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests: one that begins late would leave all other workers without work at the end.

    Each worker of xdist gets an equal part of the list first. So the first parts begin with one of the modules each.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    others = [item for item in items if item.path.name not in LONGEST]
    size = len(items) // workers
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        ordered += [item for name in LONGEST[worker::workers] for item in items if item.path.name == name]
        taken = max(0, (worker + 1) * size - len(ordered))
        ordered += others[:taken]
        del others[:taken]
    items[:] = ordered + others


@pytest.fixture
def trainkit(tmp_path: Path) -> Command:
    """The installed command, run in an empty folder."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.run([SCRIPT, *args], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, also on `sys.path` as it is for the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    own = [name for name, module in sys.modules.items() if _is_in(tmp_path, module)]
    for name in own:  # another test may import another module of this name
        del sys.modules[name]


def _is_in(folder: Path, module: Any) -> bool:
    """Return whether a module was imported from a folder."""
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_relative_to(folder)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A server that starts commands in processes with torch already imported."""
    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.close()


@pytest.fixture
def forked(forks: Forks, tmp_path: Path) -> Command:
    """The command in an empty folder, started as a fork: much faster than the installed command."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = forks.start(*args, cwd=tmp_path, **env)
        code = process.wait()
        return subprocess.CompletedProcess(args, code, process.stdout, process.stderr)

    return run


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without charts: matplotlib takes a tenth of a second for each."""
    monkeypatch.setattr("trainkit.display.report_parts.draw_svg", lambda *_: "<svg></svg>")
    monkeypatch.setattr("trainkit.engine.report.draw_png", lambda _: b"")

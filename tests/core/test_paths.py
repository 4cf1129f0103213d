"""Run directories: creation, and errors of the file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainkit.core.errors import RunDirectoryInUseError, StorageError
from trainkit.core.paths import claim_directory, display_path


def test_two_runs_in_one_second_get_separate_directories(tmp_path: Path) -> None:
    path = tmp_path / "outputs" / "day" / "time"
    assert [claim_directory(path).name for _ in range(3)] == ["time", "time_1", "time_2"]


def test_an_exact_directory_may_exist_unless_it_holds_a_run(tmp_path: Path) -> None:
    assert claim_directory(tmp_path, exact=True) == tmp_path
    (tmp_path / "run.json").touch()
    with pytest.raises(RunDirectoryInUseError, match=r"holds a run already: it contains run\.json"):
        claim_directory(tmp_path, exact=True)


@pytest.mark.parametrize(
    ("file", "hint"), [("run.json", "trainkit resume 'a run'; or choose"), ("find_lr.json", "choose")]
)
def test_a_directory_that_holds_a_run_is_refused_with_the_command_that_continues_it(
    file: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / file).touch()
    with pytest.raises(RunDirectoryInUseError) as error:
        claim_directory(Path("a run"), exact=True)
    beginning = "to continue it: " if "resume" in hint else ""
    assert error.value.problems[0].hint == f"{beginning}{hint} another directory"


def test_a_directory_that_cannot_be_created_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        claim_directory(tmp_path / "file" / "below")
    with pytest.raises(StorageError):
        claim_directory(tmp_path / "file", exact=True)


def test_a_parent_that_is_a_dangling_link_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "outputs").symlink_to("nowhere/at/all")
    with pytest.raises(StorageError):
        claim_directory(tmp_path / "outputs" / "day" / "time")


def test_paths_are_shown_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "runs" / "a") == "runs/a"
    assert display_path(tmp_path / "last") == "./last"
    assert display_path(tmp_path.parent / "b") == str(tmp_path.parent / "b")

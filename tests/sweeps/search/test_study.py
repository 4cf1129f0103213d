"""The study of a search: what a damaged file does, and what Optuna reads again."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from trainkit.config.compose import compose_sweep
from trainkit.config.schema import SearchSettings
from trainkit.config.search_space import Space
from trainkit.core.errors import CheckpointError
from trainkit.sweeps.search.storage import JOURNAL
from trainkit.sweeps.search.study import SearchStudy


@pytest.fixture(scope="module")
def search() -> tuple[SearchSettings, Space]:
    """The settings of a search with random values, and its space."""
    sweep = compose_sweep(["lr=interval(0.1,1)", "search.trials=9", "search.sampler=random"])
    assert sweep.space is not None
    return sweep.jobs[0].settings.search, sweep.space


def open_study(folder: Path, search: tuple[SearchSettings, Space]) -> SearchStudy:
    """Open the study in a folder, or create it."""
    return SearchStudy(folder, "mine", *search, "min", 3)


def test_the_incomplete_last_line_of_a_killed_process_is_dropped(
    tmp_path: Path, search: tuple[SearchSettings, Space]
) -> None:
    study = open_study(tmp_path, search)
    for _ in range(3):
        study.ask(0)
    whole = (tmp_path / JOURNAL).read_bytes()
    before = [trial.overrides for trial in study.trials()]
    last = whole.rstrip(b"\n").rfind(b"\n") + 1  # where the last line begins: it sets the overrides of trial 2
    for end in (last + 1, len(whole) - 20, len(whole) - 1):
        (tmp_path / JOURNAL).write_bytes(whole[:end])
        again = open_study(tmp_path, search)
        trials = again.trials()
        assert [trial.overrides for trial in trials[:2]] == before[:2]
        assert trials[2].overrides == (before[2] if end == len(whole) - 1 else [])
        assert again.ask(0).number == 3
        assert len(open_study(tmp_path, search).trials()) == 4
        assert len(JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL))).get_all_trials(again.id)) == 4


def test_a_damaged_line_is_refused_with_the_file_and_nothing_is_changed(
    tmp_path: Path, search: tuple[SearchSettings, Space]
) -> None:
    open_study(tmp_path, search).ask(0)
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)
    for damage in ("garbage{\n", "[]\n", "{}\n", "null\n"):
        text = "".join([lines[0], damage, *lines[2:]])
        (tmp_path / JOURNAL).write_text(text)
        with pytest.raises(CheckpointError, match=f"{JOURNAL}, cannot be used") as refused:
            open_study(tmp_path, search)
        assert "choose another hydra.sweep.dir" in str(refused.value)
        assert (tmp_path / JOURNAL).read_text() == text


def test_a_study_that_lacks_trials_of_the_ledger_is_refused(
    tmp_path: Path, search: tuple[SearchSettings, Space]
) -> None:
    study = open_study(tmp_path, search)
    study.ask(0)
    study.check_complete(-1)
    study.check_complete(0)
    with pytest.raises(CheckpointError, match="it has 1 trial, but trial 1 has a job"):
        study.check_complete(1)

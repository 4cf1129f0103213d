"""The saved config of a run: a changed byte is noticed, and an edit on purpose has to be accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trainkit
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.runs.directory import Run

BASE = ["model=mlp", "model.hidden=[4]", "epochs=1", "limit_batches=2", "progress=off", "checkpoint.keep=3"]


@pytest.fixture
def run(here: Path) -> Run:
    """Return a finished run."""
    return trainkit.train(trainkit.compose(BASE), directory=here / "run")


def edit(run: Run, old: str, new: str) -> None:
    """Replace a text in the saved config."""
    file = run.directory / ".hydra/config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(("old", "new"), [("keep: 3", "keep: 1"), ("patience: null", "patience: 1   "), ("\n", "\n\n")])
def test_a_changed_byte_of_the_saved_config_is_refused_although_no_result_depends_on_it(
    old: str, new: str, run: Run
) -> None:
    edit(run, old, new)
    before = (run.directory / "run.json").read_bytes()
    for use in (lambda: trainkit.resume(run, ["epochs=2"]), lambda: trainkit.load(run)):
        with pytest.raises(CheckpointError, match=r"config\.yaml is damaged or was edited") as refused:
            use()
        assert "resume.allow=[config]" in refused.value.problems[0].hint
    assert (run.directory / "run.json").read_bytes() == before


def test_an_edit_on_purpose_is_accepted_once(run: Run) -> None:
    edit(run, "keep: 3", "keep: 1")
    allowed = ["resume.allow=[config]"]
    trainkit.load(run, overrides=allowed)
    resumed = trainkit.resume(run, ["epochs=2", *allowed])
    assert resumed.config.checkpoint.keep == 1
    assert len(trainkit.resume(run, ["epochs=3"]).history) == 3


def test_an_edit_that_changes_the_results_still_needs_its_own_permission(run: Run) -> None:
    edit(run, "lr: 0.01", "lr: 0.02")
    with pytest.raises(CheckpointError, match=r"lr: 0\.01 in the checkpoint, 0\.02 now") as refused:
        trainkit.resume(run, ["epochs=2", "resume.allow=[config]"])
    assert "'resume.allow=[config,lr]'" in refused.value.problems[-1].hint
    trainkit.resume(run, ["epochs=2", "resume.allow=[config,lr]"])


def test_a_misspelt_permission_is_an_error(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"resume\.allow=configs: this key does not exist\n.*config"):
        trainkit.resume(run, ["epochs=2", "resume.allow=[configs]"])


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_a_resume_killed_before_or_after_it_writes_its_config_can_be_resumed(
    written: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Run._write_text

    def killed(self: Run, name: str, text: str) -> None:
        if name.endswith("config.yaml"):
            if written:
                write(self, name, text)
            assert self.log_file is not None
            self.log_file.close()
            raise KeyboardInterrupt
        write(self, name, text)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            trainkit.resume(run, ["epochs=2"])
    assert (Run.load(run.directory).config.epochs == 2) == written
    resumed = trainkit.resume(run, ["epochs=3"])
    assert len(resumed.history) == 3
    assert len(json.loads((run.directory / "run.json").read_text())["config_sha256"]) == 1


def test_a_run_of_an_older_version_is_resumed_without_the_comparison(run: Run) -> None:
    file = run.directory / "run.json"
    info = json.loads(file.read_text())
    del info["config_sha256"]
    file.write_text(json.dumps(info))
    edit(run, "keep: 3", "keep: 1")
    assert len(trainkit.resume(run, ["epochs=2"]).history) == 2


@pytest.mark.parametrize("forged", [5, [5], "x", []])
def test_a_damaged_digest_is_refused_or_rebuilt(forged: object, run: Run) -> None:
    file = run.directory / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config_sha256": forged}))
    if isinstance(forged, list):
        with pytest.raises(CheckpointError, match="damaged or was edited"):
            trainkit.resume(run, ["epochs=2"])
    trainkit.resume(run, ["epochs=2", "resume.allow=[config]"])
    assert len(trainkit.resume(run, ["epochs=3"]).history) == 3

"""`trainkit report RUN`, and the report at the end of a run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.helpers import compose_settings
from tests.saved_runs import save_run
from trainkit.cli.main import main
from trainkit.display.run_report import run_page
from trainkit.engine import report
from trainkit.engine.report import is_cheap, is_job, report_at_end, run_facts, write_run_report
from trainkit.runs.directory import Run
from trainkit.sweeps.collect import read_record

FILES = ["run.json", "history.jsonl", "params.json", "trainkit.log", ".hydra/config.yaml"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run."""
    return save_run(tmp_path_factory.mktemp("runs") / "run").directory


@pytest.fixture
def saved(template: Path, tmp_path: Path) -> Path:
    """A copy of the completed run."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def test_the_report_shows_numbers_curves_groups_config_environment_and_notes(saved: Path) -> None:
    text = write_run_report(saved).read_text()
    info = json.loads((saved / "run.json").read_text())
    for shown in ("completed", "best val/loss", "0.5000", "mine/score", "the first note", info["host"]):
        assert shown in text
    assert info["versions"]["torch"] in text
    assert text.count('<svg class="chart"') == 4  # loss, accuracy, learning rate, mine/score
    assert "0.01 (by head)" in text
    assert (saved / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_killed_run_gives_the_status_that_compare_gives(saved: Path) -> None:
    info = json.loads((saved / "run.json").read_text())
    (saved / "run.json").write_text(json.dumps({**info, "status": "running", "ended": None}))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for pid, status in ((int(dead.stdout), "failed"), (os.getpid(), "running")):
        (saved / ".lock").write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))
        record = read_record(saved)
        assert (record.status, run_facts(saved).info["status"]) == (status, status)
        assert record.why in write_run_report(saved).read_text()


def test_the_config_is_compared_with_the_defaults_of_the_same_choices(saved: Path) -> None:
    facts = run_facts(saved)
    assert facts.base == "the defaults of its choices"
    assert facts.differences == [
        ("model", "toy_cnn", "mlp"),
        ("optim", "sgd", "adam"),
        ("param_groups", "none", "head_lr"),
        ("clip_norm", "off", "1"),
    ]


def test_choices_that_cannot_be_composed_are_compared_with_the_default_config(saved: Path) -> None:
    hydra = saved / ".hydra/hydra.yaml"
    hydra.write_text(hydra.read_text().replace("model: mlp", "model: no_such_model"))
    facts = run_facts(saved)
    assert facts.base == "the default config"
    assert ("clip_norm", "off", "1") in facts.differences


@pytest.mark.usefixtures("no_drawing")
def test_the_environment_is_never_read_into_the_report(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VALUE", "the-value-of-the-environment")
    for name in ("config", "hydra"):
        file = saved / f".hydra/{name}.yaml"
        file.write_text(file.read_text().replace("mlp", "${oc.env:SOME_VALUE}") + "extra: ${oc.env:SOME_VALUE}\n")
    text = write_run_report(saved).read_text()
    assert "oc.env:SOME_VALUE" in text
    assert "the-value-of-the-environment" not in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("no_drawing")
def test_a_missing_file_gives_a_report_that_names_the_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    text = write_run_report(saved).read_text()
    assert f"missing or damaged: {name}" in text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"[" * 5000, b"[]", b'{"a": 1}', b"null\n"], ids=repr)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("no_drawing")
def test_a_damaged_file_gives_a_report(saved: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    if "config" not in name:  # composing takes time
        monkeypatch.setattr(report, "differences", lambda *_: ("", []))
    (saved / name).write_bytes(content)
    facts = run_facts(saved)
    assert "</html>" in run_page(facts)
    assert facts.missing or name in ("trainkit.log", ".hydra/config.yaml", "params.json")


def test_incomplete_lines_of_the_history_are_counted(saved: Path) -> None:
    with (saved / "history.jsonl").open("a") as file:
        file.write('{"epoch": 4, "train/')
    assert "history.jsonl: 1 line cannot be read" in run_facts(saved).missing


@pytest.mark.usefixtures("no_drawing")
def test_links_and_pipes_in_place_of_files_are_not_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("the text of another file")
    for name in ("trainkit.log", ".hydra/config.yaml", "params.json"):
        (saved / name).unlink()
    (saved / "trainkit.log").symlink_to(tmp_path / "other")
    (saved / ".hydra/config.yaml").symlink_to(tmp_path / "other")
    os.mkfifo(saved / "params.json")
    text = write_run_report(saved).read_text()
    assert "the text of another file" not in text


# ----------------------------------------------------------------------------- at the end of a run


@pytest.mark.usefixtures("no_drawing")
def test_off_writes_no_report_and_on_writes_one(saved: Path) -> None:
    for key, written in (("off", False), ("on", True)):
        run = Run.load(saved)
        report_at_end(run, compose_settings([f"report={key}"]), time.monotonic())
        assert ((saved / "report.html").exists(), run.report is not None) == (written, written)


def test_auto_writes_a_report_if_the_run_was_long_enough(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Run] = []

    def write(run: Run) -> Path:
        calls.append(run)
        return saved

    monkeypatch.setattr(report, "write_run_report", write)
    settings, run = compose_settings([]), Run.load(saved)
    assert settings.report == "auto"
    report_at_end(run, settings, time.monotonic())
    assert calls == []
    report_at_end(run, settings, time.monotonic() - 1000)
    assert calls == [run]


def test_the_limit_of_auto_depends_on_whether_matplotlib_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", sys)
    assert is_cheap(50)
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    assert not is_cheap(50)
    assert is_cheap(100)


@pytest.mark.parametrize("name", ["sweep.jsonl", "multirun.yaml"])
def test_auto_writes_no_report_in_a_job_of_a_sweep(saved: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(report, "write_run_report", lambda _: pytest.fail("a report was written"))
    assert not is_job(saved)
    (saved.parent / name).touch()
    assert is_job(saved)
    report_at_end(Run.load(saved), compose_settings([]), time.monotonic() - 1000)


def test_a_report_that_fails_is_one_note(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "run_page", fail)
    report_at_end(Run.load(saved), replace(compose_settings([]), report=True), time.monotonic())
    assert capsys.readouterr().err == "note: the report could not be written: RuntimeError: no font\n"


@pytest.mark.slow
def test_a_training_with_report_on_names_the_report_in_its_result(forked: Command, tmp_path: Path) -> None:
    done = forked("model=mlp", "epochs=1", "limit_batches=1", "report=on", "progress=off", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "report: run/report.html" in done.stdout
    assert "completed" in (tmp_path / "run/report.html").read_text()
    shown = forked("report", "run", "--json")
    assert json.loads(shown.stdout) == {"report": "run/report.html", "curves": "run/curves.png"}


# ------------------------------------------------------------------------------------- the command


def test_the_command_imports_no_torch(saved: Path) -> None:
    script = (
        "import sys; from trainkit.cli.main import main; code = main(['report', 'run']);"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=saved.parent, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "report: run/report.html\ncurves: run/curves.png\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "report takes one directory"),
        (["a", "b"], "report takes one directory"),
        (["-m", "a"], "report takes one directory"),
        ([""], "PATH is empty"),
        (["nowhere"], "does not exist"),
        (["last"], "does not exist"),
        (["empty"], "does not hold a run"),
    ],
)
def test_a_wrong_path_is_one_error_with_a_hint(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    (here / "empty").mkdir()
    assert main(["report", *argv]) == 2
    error, *hints = capsys.readouterr().err.splitlines()
    assert words in error
    assert len(hints) == 1


@pytest.mark.usefixtures("no_drawing")
def test_a_report_that_cannot_be_written_is_an_error_of_storage(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / "report.html").mkdir()
    assert main(["report", str(saved)]) == 6
    assert "cannot be written" in capsys.readouterr().err

"""The report of a sweep."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.saved_runs import save_sweep
from trainkit.cli.main import main
from trainkit.core.errors import ConfigError
from trainkit.display.sweep_report import sweep_page
from trainkit.sweeps.report import sweep_facts, write_sweep_report


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four jobs; the third has failed."""
    return save_sweep(tmp_path_factory.mktemp("sweeps") / "sweep")


@pytest.fixture
def sweep(template: Path, tmp_path: Path) -> Path:
    """A copy of the sweep."""
    return Path(shutil.copytree(template, tmp_path / "sweep"))


def test_the_jobs_are_listed_best_first_with_what_was_swept(sweep: Path) -> None:
    facts = sweep_facts(sweep)
    found = [(job.name, job.axes, job.status, job.best.get("val/loss")) for job in facts.jobs]
    assert found == [
        ("1", {"lr": "0.1", "seed": "1"}, "completed", 0.2),
        ("3", {"lr": "0.01", "seed": "1"}, "completed", 0.4),
        ("0", {"lr": "0.1", "seed": "0"}, "completed", 0.9),
        ("2", {"lr": "0.01", "seed": "0"}, "failed", None),
    ]
    assert [job.seconds for job in facts.jobs] == [3.0, 5.0, 2.0, 4.0]


def test_the_report_has_tables_curves_and_the_failure_with_its_output(sweep: Path) -> None:
    text = write_sweep_report(sweep).read_text()
    assert "3 of 4" in text
    assert "0.5500 ± 0.4950" in text  # of 0.9 and 0.2
    assert text.count('<table class="sortable">') == 2
    assert text.count('<svg class="chart"') == 3  # val/loss, train/loss, val/accuracy
    assert "failed, exit code -9: killed by SIGKILL" in text
    assert "epoch 1\nstep 2\n&lt;b&gt;Killed&lt;/b&gt;" in text
    assert (sweep / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_drawing")
def test_a_job_is_linked_by_a_relative_address(sweep: Path) -> None:
    links = re.findall(r'href="([^"]*)"', sweep_page(sweep_facts(sweep)))
    assert {link for link in links if not link.startswith(("#", "data:"))} == {"./0/", "./1/", "./2/", "./3/"}


@pytest.mark.usefixtures("no_drawing")
def test_secrets_in_the_output_of_a_job_do_not_appear(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    (sweep / "2/output.log").write_text("login with hf_0123456789abcdef\napi_key=abcdefgh12345678\nthe end\n")
    text = sweep_page(sweep_facts(sweep))
    assert "the end" in text
    assert "hf_0123456789abcdef" not in text
    assert "abcdefgh12345678" not in text


def test_only_the_end_of_a_long_output_is_shown(sweep: Path) -> None:
    (sweep / "2/output.log").write_text("".join(f"line {i}\n" for i in range(100_000)))
    tail = sweep_facts(sweep).jobs[-1].tail
    assert (len(tail), tail[-1]) == (40, "line 99999")


def test_a_sweep_without_a_ledger_has_a_report(sweep: Path) -> None:
    (sweep / "sweep.jsonl").unlink()
    assert [job.name for job in sweep_facts(sweep).jobs] == ["1", "3", "0", "2"]


def test_failed_attempts_are_not_jobs(sweep: Path) -> None:
    shutil.copytree(sweep / "2", sweep / "attempts/2-1")
    assert len(sweep_facts(sweep).jobs) == 4


@pytest.mark.parametrize("content", ["", "{", "null\n", '{"event": "queued"}\n', "\x00" * 10])
@pytest.mark.parametrize(
    "name", ["sweep.jsonl", "1/run.json", "1/history.jsonl", "1/.hydra/config.yaml", "2/output.log"]
)
@pytest.mark.usefixtures("no_drawing")
def test_damaged_files_of_a_sweep_give_a_report(sweep: Path, name: str, content: str) -> None:
    (sweep / name).write_text(content)
    facts = sweep_facts(sweep)
    assert len(facts.jobs) == 4
    assert "</html>" in sweep_page(facts)


def test_an_unreadable_job_is_named_with_its_swept_values(sweep: Path) -> None:
    (sweep / "1/run.json").write_text("{")
    facts = sweep_facts(sweep)
    job = next(job for job in facts.jobs if job.name == "1")
    assert (job.status, job.axes) == ("unreadable", {"lr": "0.1", "seed": "1"})
    assert any("run.json" in line for line in facts.missing)


@pytest.mark.usefixtures("no_drawing")
def test_the_command_writes_the_report_of_the_newest_sweep(
    sweep: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "outputs").mkdir()
    (here / "outputs/latest").symlink_to(sweep)
    assert main(["report", "last"]) == 0
    assert "report: sweep/report.html" in capsys.readouterr().out


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not hold a run"):
        write_sweep_report(tmp_path)

"""`trainkit compare`: formats, flags, exit codes, and what it imports."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeps.made_runs import make_run
from trainkit.cli.main import main


@pytest.fixture
def sweep(here: Path) -> Path:
    """Runs of two learning rates and two seeds, a failed one and a damaged one."""
    for number, (lr, seed) in enumerate((lr, seed) for lr in (0.1, 0.01) for seed in (0, 1)):
        make_run(here / "sweep" / str(number), f"lr={lr}", f"seed={seed}")
    make_run(here / "sweep" / "4", "lr=5.0", "seed=0", status="failed", why="the loss is\nNaN")
    make_run(here / "sweep" / "5", "lr=6.0", "seed=0")
    (here / "sweep" / "5" / "run.json").write_text("{")
    return here / "sweep"


@pytest.mark.usefixtures("sweep")
def test_the_table_is_followed_by_the_runs_that_are_not_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "sweep"]) == 0
    header, first, second, order, failed, unreadable = capsys.readouterr().out.splitlines()
    assert header.split() == ["lr", "n", "train/loss", "val/loss", "val/accuracy", "best", "run"]
    assert "±" in first
    assert "±" in second
    assert "the best by val/loss is first" in order
    assert failed == "failed: lr=5.0 seed=0: the loss is NaN: sweep/4"
    assert unreadable.startswith("unreadable: lr=6.0 seed=0: ")
    assert "run.json is damaged" in unreadable


@pytest.mark.usefixtures("sweep")
def test_json_holds_rows_and_the_other_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "sweep", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["mode"], found["axes"]) == ("val/loss", "min", [{"name": "lr", "key": "lr"}])
    assert {row["axes"]["lr"]: (row["count"], row["seeds"]) for row in found["rows"]} == {
        0.1: (2, [0, 1]),
        0.01: (2, [0, 1]),
    }
    assert [run["status"] for run in found["others"]] == ["failed", "unreadable"]
    assert found["others"][0]["axes"] == {"lr": 5.0}


@pytest.mark.usefixtures("sweep")
def test_csv_holds_the_exact_numbers_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "sweep", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert main(["compare", "sweep", "--csv"]) == 0
    captured = capsys.readouterr()
    read = list(csv.DictReader(captured.out.splitlines()))
    assert [float(row["val/loss"]) for row in read] == [row["metrics"]["val/loss"]["mean"] for row in rows]
    assert [float(row["val/loss std"]) for row in read] == [row["metrics"]["val/loss"]["std"] for row in rows]
    assert "failed: lr=5.0" in captured.err


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize(
    ("flag", "first", "listed"), [("--markdown", "| lr | n |", "- failed: "), ("--latex", r"\begin{tab", "% failed: ")]
)
def test_documents_get_a_table_and_a_list(
    flag: str, first: str, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", flag, "sweep"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(first)
    assert listed in out


@pytest.mark.usefixtures("sweep")
def test_sort_descending_top_and_group_by_may_be_combined(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--sort", "-lr", "sweep", "--top", "1", "--group-by", "lr,seed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["axes"]["lr"] for row in found["rows"]] == [0.1]
    assert found["hidden_rows"] == 3


@pytest.mark.usefixtures("sweep")
def test_a_plot_is_written_and_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "sweep", "--plot", "curves.svg", "--x", "lr"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "plot: curves.svg"
    assert (here / "curves.svg").exists()


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize(
    ("words", "cause", "hint"),
    [
        ([], "compare needs a path", "write trainkit compare PATH..."),
        (["swep"], "swep: this directory does not exist", "did you mean sweep?"),
        (["sweep", "--jsn"], "--jsn: compare has no such flag", "did you mean --json?"),
        (["sweep", "--json", "--csv"], "--json and --csv exclude each other", "keep --json"),
        (["sweep", "--top", "0"], "--top 0: must be a whole number", "--top 10"),
        (["sweep", "--sort"], "expected one argument", "write trainkit compare"),
        (["sweep", "--group-by", "lrr"], "lrr: no run has this config key", "did you mean lr?"),
        (["sweep", "--plot", "a.gif"], "must end with .png or .svg", "--plot curves.png"),
        (["sweep", "--plot", "no/a.png"], "the folder no does not exist", "a folder that exists"),
        (["sweep", "--x", "lr"], "--x names the axis of a plot", "add --plot"),
    ],
)
def test_a_wrong_command_line_is_one_error_with_a_hint(
    words: list[str], cause: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words]) == 2
    err = capsys.readouterr().err
    assert cause in err
    assert hint in err
    assert len(err.splitlines()) == 2


def test_a_folder_without_completed_runs_lists_the_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(here / "a" / "0", status="failed", why="out of memory")
    assert main(["compare", "a"]) == 0
    assert capsys.readouterr().out.splitlines() == ["no run is completed", "failed: out of memory: a/0"]


def test_the_newest_run_is_called_last(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(here / "outputs" / "2026-01-01" / "07-00-00", "lr=0.5")
    (here / "outputs" / "latest").symlink_to("2026-01-01/07-00-00")
    assert main(["compare", "last"]) == 0
    assert "outputs/2026-01-01/07-00-00" in capsys.readouterr().out


@pytest.mark.usefixtures("sweep")
def test_compare_imports_neither_torch_nor_numpy_nor_hydra() -> None:
    heavy = "{'torch', 'numpy', 'hydra', 'omegaconf', 'matplotlib', 'rich'}"
    code = "import sys; from trainkit.cli.main import main; main(['compare', 'sweep']); "
    code += f"assert not {heavy} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val/loss" in done.stdout

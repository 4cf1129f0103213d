"""`trainkit eval`: what it prints and writes, for one run and for several."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trainkit
from trainkit.cli.main import main
from trainkit.core.atomic import atomic_write_text
from trainkit.core.errors import CheckpointError
from trainkit.display.class_table import class_lines, draw_confusion_matrix
from trainkit.engine import evaluation_files
from trainkit.runs.directory import Run

SMALL = ["model=mlp", "model.hidden=[8]", "data=synthetic", "data.train.size=40", "data.train.shape=[4]"]
QUICK = ["epochs=2", "batch_size=10", "progress=off", "report=off"]
OTHER = "data.train.seed=5"


def train(directory: Path, *overrides: str) -> Run:
    """Train a small run."""
    config = trainkit.compose([*SMALL, *QUICK, *overrides])
    return trainkit.train(config, directory=directory)


@pytest.fixture
def run(here: Path) -> Run:
    """A run in a folder with a space in its name."""
    return train(here / "my run")


def evaluated(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Return what `trainkit eval --json` prints."""
    capsys.readouterr()
    assert main(["eval", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_prints_the_numbers_of_the_best_epoch_and_a_table_of_the_classes(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "my run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run.best is not None
    assert f"val/loss  {run.best['value']:.4f}" in lines
    assert f"equal to the numbers of epoch {run.best['epoch']} in the history" in lines
    assert sum(line.startswith(tuple("0123456789")) for line in lines[5:]) == 10  # classes
    assert "confusion matrix: my run/eval/" in lines[-1]
    with Image.open(lines[-1].partition(": ")[2]) as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_json_holds_the_numbers_that_the_file_and_python_hold(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shown = evaluated(capsys, "my run")
    written = json.loads(Path(shown["files"]["numbers"]).read_text())
    assert written == {key: value for key, value in shown.items() if key != "files"}
    assert json.loads(json.dumps(trainkit.evaluate(run)).replace("NaN", "null")) == written


def test_another_evaluation_gets_its_own_folder_and_the_same_one_keeps_its_folder(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = evaluated(capsys, "my run"), evaluated(capsys, "my run", OTHER)
    again = evaluated(capsys, "my run")
    assert first["files"] == again["files"]
    assert other["metrics"] != first["metrics"]
    assert {folder.name for folder in (run.directory / "eval").iterdir()} == {
        first["checkpoint"],
        f"{first['checkpoint']}_1",
    }
    assert json.loads(Path(first["files"]["numbers"]).read_text())["metrics"] == first["metrics"]
    Path(first["files"]["numbers"]).write_text("{")  # damaged: it may be another evaluation
    assert evaluated(capsys, "my run")["files"]["numbers"].endswith("_2/eval.json")


@pytest.mark.usefixtures("run")
def test_the_checkpoint_is_a_flag_or_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    by_flag, by_word = (evaluated(capsys, "my run", *w) for w in (["--checkpoint", "step-4"], ["checkpoint=step-4"]))
    assert by_flag == by_word
    assert (by_flag["step"], by_flag["epoch"]) == (4, 1)
    assert by_flag["history"]["equal"]


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        ([], 2, "eval needs a run"),
        (["lr=1"], 2, "eval needs a run"),
        (["nope"], 2, "nope: this directory does not exist"),
        (["last"], 2, "outputs/latest: this directory does not exist"),
        (["my run", "--checkpoint", "newest"], 2, "write best, last or step-N"),
        (["my run", "--checkpoint", "best", "checkpoint=last"], 2, "only one can be evaluated"),
        (["my run", "-m"], 2, "no flag of Hydra"),
        (["my run", "--jsn"], 2, "did you mean --json?"),
        (["my run", "model.hidden=[9]", "optim=adam"], 2, "keeps the model of the run"),
        (["my run", "--checkpoint", "step-99"], 3, "it has step-8, step-4"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_wrong_command_line_is_an_error_with_a_hint(
    words: list[str], code: int, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", *words]) == code
    captured = capsys.readouterr()
    assert cause in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.usefixtures("run")
def test_config_errors_come_before_torch_is_imported() -> None:
    code = "import sys; from trainkit.cli.main import main; print(main(['eval', 'my run', 'data.split=7', 'lr=1'])); "
    code += "print(main(['eval', 'my run', 'data=digit'])); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "2", "False"], done.stderr


@pytest.mark.parametrize(("number", "code"), [(errno.EROFS, 0), (errno.ENOSPC, 6)])
def test_the_numbers_are_printed_if_the_files_cannot_be_written(
    number: int, code: int, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str, **more: Any) -> None:
        if path.name == "eval.json":
            raise OSError(number, "no write")
        atomic_write_text(path, text, **more)

    monkeypatch.setattr(evaluation_files, "atomic_write_text", fail)
    assert main(["eval", "my run"]) == code
    captured = capsys.readouterr()
    assert run.best is not None
    assert f"val/loss  {run.best['value']:.4f}" in captured.out
    assert "cannot be written: no write" in captured.err


def test_a_link_in_place_of_the_folder_is_not_followed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    target = run.directory.parent / "elsewhere"
    target.mkdir()
    (run.directory / "eval").symlink_to(target)
    assert main(["eval", "my run"]) == 6
    assert "it is a link" in capsys.readouterr().err
    assert not list(target.iterdir())


# ----------------------------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over lr and seed; the last of its jobs is not completed."""
    folder: Path = tmp_path_factory.mktemp("sweep")
    script = Path(sys.executable).with_name("trainkit")
    words = ["-m", *SMALL, *QUICK, "lr=0.5,0.01", "seed=0,1", "hydra.sweep.dir=sweep"]
    subprocess.run([script, *words], cwd=folder, check=True, capture_output=True)
    return folder / "sweep"


def test_a_sweep_is_one_table_with_the_best_first_and_the_seeds_folded(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, str(sweep))
    runs = {Path(one["run"]).name: one["metrics"]["val/loss"] for one in found["runs"]}
    histories = {name: Run.load(sweep / name).best for name in runs}
    assert runs == {name: best["value"] for name, best in histories.items() if best is not None}
    rows = found["table"]["rows"]
    assert [row["count"] for row in rows] == [2, 2]
    means = [row["metrics"]["val/loss"]["mean"] for row in rows]
    assert means == sorted(means)
    by_lr = {row["axes"]["lr"]: row["metrics"]["val/loss"]["mean"] for row in rows}
    assert by_lr[0.5] == pytest.approx((runs["0"] + runs["1"]) / 2)
    assert found["failed"] == []


def test_a_run_that_fails_is_reported_and_the_others_are_shown(
    sweep: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = train(here / "broken", "epochs=1")
    (broken.directory / "checkpoints" / "best").write_text("elsewhere")
    assert main(["eval", str(sweep / "0"), "broken", str(sweep / "2")]) == 10
    captured = capsys.readouterr()
    assert "failed: broken: broken has no best checkpoint" in captured.out
    assert captured.out.count(str(sweep)) == 2
    assert "it has step-" in captured.err
    assert main(["eval", "broken", "broken/.", str(sweep / "0"), "data.split=7"]) == 2  # all fail


@pytest.mark.parametrize("argv", [["eval", "last"], ["predict", "last", "x.png"], ["export", "last", "--format=onnx"]])
def test_the_word_last_is_explained_on_stderr(argv: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "outputs" / "2026-01-01" / "10-00-00"
    run.mkdir(parents=True)
    (run / "run.json").write_text("[]")  # damaged, so that no command goes on
    (here / "outputs" / "latest").symlink_to(run)
    (here / "x.png").touch()
    assert main(argv) != 0
    captured = capsys.readouterr()
    assert "note: last is outputs/2026-01-01/10-00-00, the newest in outputs\n" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("why", ["step 1: the loss is nan", None])
def test_a_run_without_a_best_checkpoint_says_why_it_failed_and_names_the_newest_run_that_has_one(
    why: str | None, here: Path
) -> None:
    _, bad = (train(here / "outputs" / "2026-01-01" / name, "epochs=1") for name in ("10-00-00", "11-00-00"))
    train(here / "outputs" / "2025-12-31" / "12-00-00", "epochs=1")
    for link in bad.directory.glob("checkpoints/best"):
        link.unlink()
    status = "failed" if why else "running"  # it was killed
    (bad.directory / "run.json").write_text(json.dumps({**bad.info, "status": status, "why": why}))
    with pytest.raises(CheckpointError) as error:
        trainkit.load(bad.directory)
    problem = error.value.problems[0]
    cause = why or "its process ended without writing a cause"
    assert problem.cause.endswith(f"11-00-00 has no best checkpoint: the run failed: {cause}")
    assert problem.hint.endswith("the newest run that has one is outputs/2026-01-01/10-00-00")


def test_jobs_that_are_not_completed_are_left_out(sweep: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(here / "runs" / "a", "epochs=1")
    stopped = train(here / "runs" / "b", "epochs=1")
    stopped.info["status"] = "stopped"
    stopped.write_info()
    found = evaluated(capsys, "runs")
    assert [one["run"] for one in found["runs"]] == [str(done.directory)]
    assert main(["eval", "runs"]) == 0
    assert "1 run left out: not completed" in capsys.readouterr().err
    with pytest.raises(trainkit.ConfigError, match="is a sweep"):
        trainkit.evaluate(sweep)


# ------------------------------------------------------------------------------- tables and pictures


def result_of(count: int) -> dict[str, Any]:
    """Return numbers of made-up classes: the F1 of class i is i / count."""
    names = [f"class_$_{i}" for i in range(count)]
    rows = [{"class": n, "samples": 2, **dict.fromkeys(("precision", "recall", "f1", "accuracy"), i / count)}
            for i, n in enumerate(names)]  # fmt: skip
    averages = {"precision": 0.1, "recall": 0.2, "f1": None}
    return {"classes": rows, "macro": averages, "weighted": averages, "confusion_matrix": None}


def test_the_table_of_many_classes_shows_the_worst() -> None:
    lines = class_lines(result_of(100))
    assert [line.split()[0] for line in lines[1:21]] == [f"class_$_{i}" for i in range(20)]
    assert lines[-1] == "shown: the 20 classes with the lowest f1, of 100"
    assert len(class_lines(result_of(50))) == 53


@pytest.mark.parametrize("count", [2, 30, 100, 300])
def test_a_confusion_matrix_of_few_or_many_classes_is_a_picture(count: int, tmp_path: Path) -> None:
    matrix = [[5 * (i == j) + (j == 0) for j in range(count)] for i in range(count)]
    names = [f"a long name of a class, ${i}" for i in range(count)]
    (tmp_path / "matrix.png").write_bytes(draw_confusion_matrix(matrix, names))
    with Image.open(tmp_path / "matrix.png") as picture:
        assert min(picture.size) > 300
        assert max(picture.size) < 6000

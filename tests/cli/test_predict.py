"""`trainkit predict`: what it writes, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trainkit as api
from tests.conftest import SCRIPT, Command
from trainkit.cli.commands.predict import parse
from trainkit.core.errors import ConfigError
from trainkit.display.rows import RowText

TABLE = "size,city,big\n" + "".join(f"{i / 7},{'ab'[i % 2]},{'ny'[i > 30]}\n" for i in range(60))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "table.csv").write_text(TABLE)
    data = ["data=table", f"data.file={folder / 'table.csv'}", "data.target=big", "model=mlp", "model.hidden=[4]"]
    config = api.compose([*data, "epochs=1", "progress=off", "report=off"])
    return api.train(config, directory=folder / "run").directory


def read_csv(text: str) -> list[dict[str, str]]:
    """Return the rows of CSV."""
    return list(csv.DictReader(text.splitlines(keepends=True)))


def test_rows_are_csv_on_stdout_and_json_lines_in_a_file(forked: Command, tmp_path: Path, run: Path) -> None:
    name = 'a, "b".csv'
    (tmp_path / name).write_text("size,city\n1,a\n2,c\n3,b\n")
    done = forked("predict", str(run), name, "--probabilities", "device=cpu")
    assert done.returncode == 5
    assert f"cannot be read: {name}, row 2: the training set has no value 'c' in the column 'city'" in done.stderr
    assert "error: 1 input could not be read; the other 2 are predicted" in done.stderr
    rows = read_csv(done.stdout)
    assert [*rows[0]] == ["file", "row", "class", "probability", "p_n", "p_y"]
    assert [(row["file"], row["row"]) for row in rows] == [(name, "1"), (name, "3")]
    forked("predict", str(run), name, "--output", "out.jsonl", "--top", "2")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [float(row["probability"]) for row in rows] == [row["probability"] for row in written]
    assert [*written[0]] == ["file", "row", "class", "probability", "class_2", "probability_2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "out.jsonl"]


def test_no_file_is_written_if_no_row_can_be_read(forked: Command, tmp_path: Path, run: Path) -> None:
    (tmp_path / "bad.csv").write_text("size,city\n1,c\n2,d\n")
    done = forked("predict", str(run), "bad.csv", "--output", "out.csv")
    assert done.returncode == 5
    assert "2 inputs could not be read; the other 0 are predicted" in done.stderr
    assert not (tmp_path / "out.csv").exists()


def test_a_table_can_be_piped_in_and_the_rows_into_head(tmp_path: Path, run: Path) -> None:
    (tmp_path / "many.csv").write_text("size,city\n" + "1,a\n" * 30_000)
    command = f"cat many.csv | {SCRIPT} predict {run} - --json | head -n 2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert [json.loads(line)["row"] for line in done.stdout.splitlines()] == [1, 2]
    assert done.stderr == ""


def test_an_output_that_cannot_be_written_leaves_the_old_file(forked: Command, tmp_path: Path, run: Path) -> None:
    (tmp_path / "out.csv").write_text("old")
    (tmp_path / "new.csv").write_text("size\n1\n")
    done = forked("predict", str(run), "new.csv", "--checkpoint", "step-99", "--output", "out.csv")
    assert done.returncode == 3
    assert "has no step-99 checkpoint" in done.stderr
    assert (tmp_path / "out.csv").read_text() == "old"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ([], "predict needs a run and files"),
        (["run"], "predict needs a run and files"),
        (["run", "device=cpu"], "predict needs a run and files"),
        (["run", "a", "--tpo=3"], "--tpo=3: predict has no such flag"),
        (["run", "a", "--top", "0"], "--top 0: must be a whole number"),
        (["run", "a", "--batch-size", "x"], "--batch-size x: must be a whole number"),
        (["run", "a", "--json", "--format", "csv"], "--format csv and --json exclude each other"),
        (["run", "a", "--format", "xml"], "--format xml: there is no such format"),
        (["run", "a", "--output", "a.xlsx"], "--output a.xlsx: there is no such format"),
        (["run", "a", "--output", "none/a.csv"], "the folder none does not exist"),
        (["run", "-", "-"], "the standard input can be read once"),
    ],
)
def test_a_wrong_command_line_is_refused(words: list[str], cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert cause in str(caught.value)


def test_a_file_with_an_equals_sign_is_a_file(here: Path) -> None:
    (here / "lr=3.png").touch()
    args = parse(["run", "lr=3.png", "a=b.png", "lr=4", "--", "--top"])
    assert args.files == ["lr=3.png", "a=b.png", "--top"]
    assert args.overrides == ["lr=4"]


def lines_of(form: str, *rows: dict[str, Any]) -> Iterator[bytes]:
    """Yield the text of rows."""
    text = RowText(form)
    return (text.encode(row) for row in rows)


def test_csv_keeps_names_and_bytes_exactly() -> None:
    names = ['a,"b"\nc', os.fsdecode(b"\xff.png"), "ü;\t", " "]
    lines = b"".join(lines_of("csv", *({"file": name, "p": {"x": 0.5}, "list": ["a", 1]} for name in names)))
    found = read_csv(lines.decode(errors="surrogateescape"))
    assert found == [{"file": name, "p_x": "0.5", "list": '["a", 1]'} for name in names]


def test_json_lines_are_strict_and_hold_every_name() -> None:
    row = {"file": os.fsdecode(b"\xff.png"), "outputs": [1.0, float("nan")]}
    (line,) = lines_of("jsonl", row)
    assert json.loads(line) == {"file": row["file"], "outputs": [1.0, None]}


def test_csv_refuses_outputs_that_are_not_numbers() -> None:
    with pytest.raises(ConfigError, match="CSV has no place for them"):
        next(lines_of("csv", {"file": "a", "outputs": [[1.0]]}))

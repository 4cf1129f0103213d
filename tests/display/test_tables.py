"""Tables as text: every format shows the same cells, and escapes what it would interpret."""

from __future__ import annotations

import csv

import pytest

from trainkit.display.tables import csv_lines, latex_table, latex_text, markdown_table, plain_table

HEADER = ["optim", "val/loss"]
ROWS = [["a|b", "0.1 ± 0.2"], ['c,"d"\n& \x1b[31m', "1_0%"]]


def test_plain_columns_are_aligned_and_long_cells_are_shortened() -> None:
    lines = plain_table(HEADER, [["x" * 200, "1"], ["y", "2"]])
    assert len({line.index(value) for line, value in zip(lines, ["val", "1", "2"], strict=True)}) == 1
    assert "…" in lines[1]


def test_markdown_has_as_many_cells_in_each_line() -> None:
    lines = markdown_table(HEADER, ROWS)
    assert lines[:2] == ["| optim | val/loss |", "| --- | --- |"]
    assert {line.replace(r"\|", "").count("|") for line in lines} == {3}


def test_latex_escapes_its_special_characters() -> None:
    assert latex_text("a_b & 50% {x} $y$ #1 ~ ^ \\ ±") == (
        r"a\_b \& 50\% \{x\} \$y\$ \#1 \textasciitilde{} \textasciicircum{} \textbackslash{} $\pm$"
    )
    lines = latex_table(HEADER, ROWS)
    assert lines[0] == r"\begin{tabular}{ll}"
    assert lines[-1] == r"\end{tabular}"
    assert len(lines) == 8


def test_csv_is_read_back_as_written() -> None:
    assert list(csv.reader(csv_lines(HEADER, [["a,b", 'c "d"'], ["", "±"]]))) == [HEADER, ["a,b", 'c "d"'], ["", "±"]]


@pytest.mark.parametrize("table", [plain_table, markdown_table, latex_table, csv_lines])
def test_no_cell_begins_a_line_or_reaches_the_terminal_as_a_control_character(table: object) -> None:
    assert callable(table)
    lines = table(HEADER, ROWS)
    assert not any(character in line for line in lines for character in "\x1b\n\r")

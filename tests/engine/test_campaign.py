"""A small campaign of kills, damaged files and fuzzed readers has only allowed outcomes."""

from __future__ import annotations

import pytest

from tests.test_benchmarks import table_rows

pytestmark = pytest.mark.slow


def test_kills_and_damaged_files_have_only_allowed_outcomes() -> None:
    rows = table_rows("campaign", "--kills", "6", "--corruptions", "12", "--fuzz-seconds", "0", "--seed", "1")
    numbers = {part: sum(int(number) for name, _, number in rows if name == part) for part, *_ in rows}
    assert numbers["kill"] >= 6
    assert numbers["corruption"] == 12
    assert not [outcome for _, outcome, _ in rows if outcome.startswith("WRONG")]


def test_fuzzed_files_are_read_or_refused() -> None:
    rows = table_rows("campaign", "--kills", "0", "--corruptions", "0", "--fuzz-seconds", "1", "--seed", "1")
    assert {part for part, *_ in rows} == {"fuzz"}
    assert sum(int(number.replace(",", "")) for _, _, number in rows) >= 50
    assert not [outcome for _, outcome, _ in rows if outcome.startswith("WRONG")]

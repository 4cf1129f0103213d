"""The table at the end of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command

MODULE = """
class Score:
    def __init__(self, value):
        self.value = value

    def on_epoch(self, state, metrics):
        metrics["mine/score"] = self.value
"""


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_run_by_a_hooks_metric_is_first_and_its_value_is_shown(
    mode: str, tmp_path: Path, forked: Command
) -> None:
    (tmp_path / "scores.py").write_text(MODULE)
    result = forked(
        "-m", "+hooks.s={_target_: scores.Score, value: 0}", "hooks.s.value=0.25,0.75,0.5", "model=mlp", "epochs=1",
        "limit_batches=1", "monitor.metric=mine/score", f"monitor.mode={mode}", "progress=off",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    header, *rows = [line for line in result.stdout.splitlines() if line]
    assert "mine/score" in header
    shown = [float(value) for row in rows for value in row.split() if value in ("0.2500", "0.5000", "0.7500")]
    assert shown == sorted([0.25, 0.5, 0.75], reverse=mode == "max")

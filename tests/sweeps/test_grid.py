"""A sweep over values: a job that fails never ends the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainkit.cli.main import main
from trainkit.engine.train import train
from trainkit.sweeps import grid


def test_a_job_with_an_unexpected_error_is_reported_in_two_lines_and_the_others_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[float] = []

    def fails_once(composed: Any) -> Any:
        started.append(composed.settings.lr)
        if composed.settings.lr == 0.1:
            raise RuntimeError("an unexpected error")
        return train(composed)

    monkeypatch.setattr(grid, "train", fails_once)
    code = main(["-m", "lr=0.1,0.2", "model=mlp", "epochs=1", "limit_batches=1", "progress=off"])
    text = capfd.readouterr().err
    assert code == 10
    assert started == [0.1, 0.2]
    assert "error: RuntimeError: an unexpected error" in text
    assert "test_grid.py, line" in text
    assert "Error executing job" not in text
    assert "Traceback" not in text
    assert len(list((here / "outputs").glob("sweeps/*/*/1/history.jsonl"))) == 1

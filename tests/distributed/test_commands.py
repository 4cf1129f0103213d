"""Commands that torchrun starts: those that train use all ranks, the others run once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.helpers import run_ranks
from tests.processes import Forks

SMALL = ["model=mlp", "model.hidden=[8]", "epochs=1", "limit_batches=3", "progress=off", "report=off"]


@pytest.fixture(scope="module")
def cwd(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run `run` of two ranks."""
    folder = tmp_path_factory.mktemp("commands")
    ended = run_ranks(forks, 2, *SMALL, "hydra.run.dir=run", cwd=folder)
    assert ended.codes == [0, 0], ended.stderr
    assert "val/loss" in ended.stdout[0]
    assert ended.stdout[1] == ""
    return folder


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["params", *SMALL, "--json"], '"group": "default"'),
        (["list", "optim"], "adamw"),
        (["why", "lr", *SMALL], "optim/sgd.yaml"),
        (["compare", "run"], "val/loss"),
        (["eval", "run", "device=cpu"], "val/loss"),
        (["--cfg", "job", *SMALL], "batch_size: 32"),
        (["--version"], "trainkit "),
        (["find-lr", *SMALL, "--steps=20", "--json"], "lr"),
    ],
)
def test_a_command_that_does_not_train_a_run_prints_once(
    forks: Forks, cwd: Path, words: list[str], printed: str
) -> None:
    ended = run_ranks(forks, 2, *words, cwd=cwd)
    assert ended.codes == [0, 0], ended.stderr
    assert printed in ended.stdout[0]
    assert (ended.stdout[1], ended.stderr[1]) == ("", "")


@pytest.mark.parametrize(
    "words",
    [["-m", "lr=1,2", *SMALL], ["bench", "--try", *SMALL], ["verify-resume", *SMALL]],
    ids=lambda words: words[0],
)
def test_a_command_that_starts_processes_itself_is_refused_once(forks: Forks, cwd: Path, words: list[str]) -> None:
    ended = run_ranks(forks, 2, *words, cwd=cwd)
    assert ended.codes == [2, 0], ended.stderr
    assert "torchrun has started 2 processes, and trainkit" in ended.stderr[0]
    assert "start this command without torchrun" in ended.stderr[0]
    assert ended.stderr[1] == ""


def test_bench_measures_the_ranks_together(forks: Forks, cwd: Path) -> None:
    ended = run_ranks(forks, 2, "bench", *SMALL, "batch_size=33", "--steps=5", "--json", cwd=cwd)
    assert ended.codes == [0, 0], ended.stderr
    result = json.loads(ended.stdout[0])
    assert (result["ranks"], result["batch_size"], result["by_hand"]) == (2, 33, None)
    assert result["samples_per_second"] == pytest.approx(33 / result["step"])
    assert ended.stdout[1] == ""
    text = run_ranks(forks, 1, "bench", *SMALL, "--steps=5", "devices=2", cwd=cwd)
    assert text.stdout[0].count("on 2 ranks together") == 1

"""Trainings on 2 and 4 ranks have the numbers of one process."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.helpers import Case, largest_difference, train_cases
from tests.processes import Forks

DATA = ["data=synthetic", "data.train.size=210", "data.split=0.2", "batch_size=33", "epochs=3"]


def test_two_ranks_have_the_weights_of_one_process(forks: Forks, tmp_path: Path) -> None:
    cases = {"plain": Case(["model=mlp", *DATA])}
    alone, pair = (train_cases(forks, ranks, cases, tmp_path)["plain"] for ranks in (1, 2))
    assert pair.codes == [0, 0], pair.errors
    assert largest_difference(pair.states[0], pair.states[1]) == 0
    assert largest_difference(pair.states[0]["objects"]["model"], alone.states[0]["objects"]["model"]) < 1e-6

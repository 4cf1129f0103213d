"""`data.folds` and `data.fold`: cross-validation."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.conftest import Command
from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import ConfigError
from trainkit.data.split import take_fold
from trainkit.data.store import Store


def folds_of(targets: torch.Tensor, folds: int) -> list[list[int]]:
    """Return the indices of the validation samples of each fold."""
    store = Store.of(TensorDataset(torch.arange(len(targets)), targets))
    found = []
    for fold in range(folds):
        train, val = (list(part.dataset.indices) for part in take_fold(store, folds, fold))
        assert sorted(train + val) == list(range(len(targets)))
        found.append(val)
    return found


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_have_the_properties_of_stratified_folds(folds: int) -> None:
    targets = torch.randint(0, 4, (101,), generator=torch.Generator().manual_seed(1)) ** 2
    parts = folds_of(targets, folds)
    assert sorted(itertools.chain(*parts)) == list(range(101))  # complete and disjoint
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for label in targets.unique():
        counts = [int((targets[part] == label).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_folds_of_numbers_are_disjoint_and_complete() -> None:
    assert sorted(itertools.chain(*folds_of(torch.rand(17), 4))) == list(range(17))


def test_the_folds_do_not_depend_on_the_seed_and_replace_the_split_of_shipped_data() -> None:
    def held_out(seed: int) -> list[int]:
        overrides = ["data=synthetic", "data.train.size=40", "model=mlp", "data.folds=4", "data.fold=1"]
        session = build_session(compose_settings([*overrides, f"seed={seed}"]))
        assert session.val is not None
        assert (session.train.samples, session.val.samples) == (30, 10)
        return list(session.val.dataset.indices)

    assert held_out(0) == held_out(1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.fold=0"], "data.folds is off"),
        (["data.folds=5"], "data.fold is off"),
        (["data.folds=5", "data.fold=5"], "the folds have the numbers 0 to 4"),
        (["data.folds=5", "data.fold=0", "data.split=0.1"], "data.split=0.1: the fold is the validation set"),
        (["data=cifar10", "data.folds=5", "data.fold=0"], "data.val: the fold is the validation set"),
    ],
)
def test_folds_that_contradict_other_keys_are_a_config_error(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose_settings(overrides)


def test_more_folds_than_samples_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="the training set has 3 samples"):
        take_fold(Store.of(TensorDataset(torch.zeros(3), torch.zeros(3))), 4, 0)


@pytest.mark.slow
def test_a_sweep_trains_all_folds_and_compare_prints_their_mean(trainkit: Command) -> None:
    small = ["experiment=table_regression"]
    folds = ["-m", "data.folds=3", "data.fold=range(3)", "epochs=1", "hydra.sweep.dir=sweep"]
    swept = trainkit(*small, *folds)
    assert swept.returncode == 0, swept.stderr
    shown = trainkit("compare", "sweep").stdout.splitlines()
    assert shown[0].split()[0] == "fold"
    assert {line.split()[0] for line in shown[1:4]} == {"0", "1", "2"}
    mean = trainkit("compare", "sweep", "--group-by", "data.folds").stdout.splitlines()
    assert mean[0].split()[:2] == ["data.folds", "n"]
    assert mean[1].split()[:2] == ["3", "3"]


@pytest.mark.slow
def test_a_killed_fold_resumes_to_the_same_bits(trainkit: Command) -> None:
    small = ["experiment=table_regression"]
    more = ["data.folds=3", "data.fold=1", "epochs=2", "data.sampler=torch.utils.data.RandomSampler"]
    done = trainkit("verify-resume", *small, *more, "checkpoint.every_steps=3", "--kills", "1", "--json")
    assert json.loads(done.stdout)["equal"], done.stderr

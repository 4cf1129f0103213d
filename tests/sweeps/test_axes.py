"""What differs between runs: choices and keys, by their shortest names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sweeps.made_runs import make_run, write_yaml
from trainkit.sweeps.axes import MISSING, short_name
from trainkit.sweeps.collect import Collection, collect


def collection_of(folder: Path, *runs: str, **more: Any) -> Collection:
    """Make runs with these overrides, and collect them."""
    for number, overrides in enumerate(runs):
        make_run(folder / str(number), *overrides.split(), **more)
    return collect([folder])


def names_and_values(collection: Collection) -> dict[str, list[Any]]:
    """Return the values of each axis, run by run."""
    return {axis.name: [axis.value(run) for run in collection.runs] for axis in collection.axes}


def test_a_choice_is_one_axis_and_the_keys_that_follow_from_it_are_none(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "optim=sgd", "optim=adam", "optim=adadelta")
    assert names_and_values(collection) == {"optim": ["sgd", "adam", "adadelta"]}


def test_a_key_that_is_given_is_an_axis_besides_the_choice(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "optim=sgd lr=0.1", "optim=adam lr=0.2", "optim=adam optim.weight_decay=0.5")
    values = {"optim": ["sgd", "adam", "adam"], "lr": [0.1, 0.2, 0.001], "weight_decay": [0, 0, 0.5]}
    assert names_and_values(collection) == values


def test_a_key_that_only_one_choice_has_is_missing_in_the_others(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "optim=sgd optim.momentum=0.9", "optim=adam")
    assert names_and_values(collection) == {"optim": ["sgd", "adam"], "momentum": [0.9, MISSING]}


def test_a_key_that_differs_for_the_same_choice_is_an_axis(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "optim=adam")
    make_run(tmp_path / "1", "optim=adam", "optim.betas=[0.8, 0.9]")  # an edited file: no override is recorded
    write_yaml(tmp_path / "1" / ".hydra" / "overrides.yaml", ["optim=adam"])
    make_run(tmp_path / "2", "optim=sgd")
    assert names_and_values(collect([tmp_path])) == {
        "optim": ["adam", "adam", "sgd"],
        "betas": [[0.9, 0.999], [0.8, 0.9], MISSING],
    }


def test_a_key_outside_of_the_group_is_an_axis_also_without_an_override(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "optim=sgd")
    make_run(tmp_path / "1", "optim=adam", "clip_norm=1.0")
    write_yaml(tmp_path / "1" / ".hydra" / "overrides.yaml", ["optim=adam"])
    assert names_and_values(collect([tmp_path])) == {"optim": ["sgd", "adam"], "clip_norm": [None, 1.0]}


def test_what_an_experiment_chooses_follows_from_it(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "experiment=a", "model=cnn", "optim=adam", "epochs=7")
    write_yaml(tmp_path / "0" / ".hydra" / "overrides.yaml", ["experiment=a"])
    make_run(tmp_path / "1", "experiment=b")
    assert names_and_values(collect([tmp_path])) == {"experiment": ["a", "b"]}


def test_another_target_is_a_choice(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "optim=sgd", "optim._target_=torch.optim.NAdam")
    assert names_and_values(collection) == {"optim": ["sgd", "torch.optim.NAdam"]}


def test_without_hydras_settings_the_overrides_say_what_was_chosen(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "optim=sgd lr=0.1", "optim=adam lr=0.1", hydra=False)
    assert names_and_values(collection) == {"optim": ["sgd", "adam"]}


def test_seed_progress_and_loggers_are_no_axes_but_another_seed_is(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "seed=0", "seed=1 progress=rich logger=csv", "seed=0 data.train.seed=3")
    assert names_and_values(collection) == {"train.seed": [0, 0, 3]}


def test_the_order_of_the_axes_is_that_of_the_command_line(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, "lr=0.1 clip_norm=1 optim=sgd", "lr=0.2 clip_norm=2 optim=adam")
    assert list(names_and_values(collection)) == ["lr", "clip_norm", "optim"]


def test_equal_numbers_of_different_types_are_no_axis(tmp_path: Path) -> None:
    assert not collection_of(tmp_path, "lr=1", "lr=1.0").axes


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lr", "lr"),
        ("optim.lr", "optim.lr"),  # the root key `lr` is another one
        ("optim.muon.weight_decay", "muon.weight_decay"),
        ("optim.muon.momentum", "momentum"),
        ("model.init", "init"),
    ],
)
def test_a_name_is_the_shortest_that_no_other_key_has(key: str, name: str) -> None:
    keys = ["lr", "optim.lr", "optim.muon.weight_decay", "optim.sgd.weight_decay", "optim.muon.momentum", "model.init"]
    assert short_name(key, keys) == name

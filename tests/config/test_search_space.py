"""The space of a search, read from Hydra's syntax."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from trainkit.config.compose import compose_sweep
from trainkit.config.search_path import make_sweep_loader
from trainkit.config.search_space import Axis, Space, read_space
from trainkit.core.errors import ConfigError


def space_of(*overrides: str, **params: Any) -> Space:
    """Return the space of a search without an end."""
    return read_space(make_sweep_loader(None), overrides, params)


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lr=interval(0.1,1)", Axis("lr", "float", 0.1, 1.0)),
        ("lr=tag(log,interval(1e-4,1))", Axis("lr", "float", 1e-4, 1.0, log=True)),
        ("batch_size=int(interval(16,64))", Axis("batch_size", "int", 16, 64)),
        ("batch_size=int(tag(log,interval(1,64)))", Axis("batch_size", "int", 1, 64, log=True)),
        ("batch_size=range(16,65,16)", Axis("batch_size", "int", 16, 64, step=16)),
        ("batch_size=range(1,10)", Axis("batch_size", "int", 1, 9)),
        ("batch_size=range(64,0,-16)", Axis("batch_size", "int", 16, 64, step=16)),
        ("optim=sgd,adam", Axis("optim", "choice", choices=("sgd", "adam"), is_group=True)),
        ("optim=choice(sgd,adam)", Axis("optim", "choice", choices=("sgd", "adam"), is_group=True)),
        ("ema=off,0.9", Axis("ema", "choice", choices=("off", "0.9"))),
        ("+optim.x=interval(0,1)", Axis("+optim.x", "float", 0.0, 1.0)),
        ("model.hidden=[8],[8,16]", Axis("model.hidden", "choice", choices=("[8]", "[8,16]"))),
    ],
)
def test_an_override_is_read_as_an_axis(text: str, axis: Axis) -> None:
    assert space_of(text).axes == [axis]


def test_overrides_with_one_value_are_shared_and_keys_of_the_search_are_not() -> None:
    space = space_of("lr=interval(0,1)", "epochs=3", "search.trials=4", "hydra.launcher.n_jobs=1")
    assert space.fixed == ["epochs=3"]


def test_the_command_line_has_precedence_over_params() -> None:
    assert space_of("lr=0.1", lr="interval(0,1)").axes == []
    assert space_of(lr="interval(0,1)").axes == [Axis("lr", "float", 0.0, 1.0)]


def test_each_axis_appears_in_the_order_of_the_command_after_the_groups() -> None:
    space = space_of("lr=interval(0,1)", "optim=sgd,adam", "batch_size=8,16")
    assert [axis.name for axis in space.axes] == ["optim", "lr", "batch_size"]


def test_the_samples_use_every_choice_and_both_ends() -> None:
    checked = compose_sweep(
        [
            "optim=sgd,adam",
            "optim.momentum=interval(0,0.9)",
            "batch_size=8,16,32",
            "lr=interval(0.1,1)",
            "search.trials=1",
        ]
    )
    assert checked.space is not None
    jobs = [set(sample) for sample in checked.space.samples()]
    for optim, size in itertools.product(("sgd", "adam"), ("8", "16", "32")):
        assert any({f"optim={optim}", f"batch_size={size}"} <= job for job in jobs)
    for optim, lr in itertools.product(("sgd", "adam"), ("0.1", "1.0")):
        assert any({f"optim={optim}", f"lr={lr}"} <= job for job in jobs)
    assert all(any(text.startswith("optim.momentum") for text in job) == ("optim=sgd" in job) for job in jobs)


def test_the_combinations_are_those_of_itertools_without_keys_that_do_not_exist() -> None:
    checked = compose_sweep(
        ["optim=sgd,adam", "optim.momentum=0,0.9", "batch_size=range(8,25,8)", "search.sampler=grid", "search.trials=9"]
    )
    assert checked.space is not None
    found = [tuple(combination.values()) for combination in checked.space.combinations()]
    sizes = [8, 16, 24]
    assert found == [*itertools.product(["sgd"], ["0", "0.9"], sizes), *itertools.product(["adam"], sizes)]


@pytest.mark.parametrize(
    "text", ["lr=interval(1,1)", "lr=range(1,1)", "lr=tag(log,range(1,9,2))", "lr=tag(a,range(3))"]
)
def test_values_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lr="):
        space_of(text)

"""The generators for reading data are apart from those of the model."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.core import rng
from trainkit.core.rng import SeparateGenerators, python_state, set_python_state


@pytest.mark.parametrize("normals", [0, 1, 2])
def test_code_in_the_block_does_not_change_what_the_model_draws(normals: int) -> None:
    def draw(*, separate: SeparateGenerators | None) -> list[float]:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        drawn = []
        for _ in range(4):
            drawn += np.random.normal(size=normals).tolist()  # NumPy makes two, and keeps the second
            if separate is not None:
                with separate.active():
                    np.random.normal()
                    random.random()
                    torch.rand(1)
            drawn += [np.random.normal(), random.random(), float(torch.rand(()))]
        return drawn

    assert draw(separate=SeparateGenerators()) == draw(separate=None)


@pytest.mark.parametrize("place", ["known", "unknown"])
def test_a_kept_normal_number_survives_whatever_state_was_set_before(place: str, monkeypatch: Any) -> None:
    if place == "unknown":  # as in a NumPy that keeps it elsewhere
        monkeypatch.setattr(rng, "KEPT_NORMAL", None)
    separate = SeparateGenerators()

    def read() -> None:
        with separate.active():
            np.random.normal()

    np.random.seed(0)
    wanted = [np.random.normal() for _ in range(2)]
    np.random.seed(0)
    found = [np.random.normal()]
    state = np.random.get_state()
    read()
    np.random.normal()
    read()
    np.random.set_state(state)  # the words are those of the last read, and a number is kept
    read()
    assert [*found, np.random.normal()] == wanted


def test_a_bit_generator_of_the_user_is_restored() -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        np.random.set_bit_generator(np.random.PCG64(3))  # type: ignore[attr-defined]
        np.random.normal()
        state = np.random.get_state(legacy=False)
        with SeparateGenerators().active():
            np.random.normal(size=3)
        assert np.random.get_state(legacy=False) == state
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["known", "unknown"])
@pytest.mark.parametrize("draws", [0, 1, 623, 624, 625])
def test_a_saved_state_of_pythons_generator_gives_the_same_draws(draws: int, place: str, monkeypatch: Any) -> None:
    if place == "unknown":  # as in a Python that keeps the state elsewhere
        monkeypatch.setattr(rng, "PYTHON_STATE", None)
    random.seed(4)
    for _ in range(draws):
        random.getrandbits(32)
    random.gauss()  # makes two numbers, and keeps the second
    saved, oracle = python_state(), random.getstate()
    wanted = [random.gauss(), random.random(), random.gauss()]
    random.seed(5)
    assert python_state() != saved
    set_python_state(saved)
    assert random.getstate() == oracle
    assert python_state() == saved
    assert [random.gauss(), random.random(), random.gauss()] == wanted


def test_the_places_of_the_states_are_known_here() -> None:
    if sys.implementation.name == "cpython":
        assert rng.PYTHON_STATE is not None
        assert rng.KEPT_NORMAL is not None

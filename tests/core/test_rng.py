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


@pytest.mark.parametrize("address", ["known", "unknown"])
@pytest.mark.parametrize("draws", [0, 1, 623, 624, 625])
def test_a_saved_state_of_pythons_generator_gives_the_same_draws(draws: int, address: str, monkeypatch: Any) -> None:
    if address == "unknown":  # as in a Python that keeps the state elsewhere
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


def test_this_python_keeps_the_state_where_it_can_be_copied_as_bytes() -> None:
    if sys.implementation.name == "cpython":
        assert rng.PYTHON_STATE is not None

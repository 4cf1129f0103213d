"""The generators for reading data are apart from those of the model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from trainkit.core.rng import SeparateGenerators


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

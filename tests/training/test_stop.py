"""Stops by a signal: the training ends between two steps, with its RNG states and buffers unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import (
    make_state,
)
from trainkit.core.errors import Stopped
from trainkit.core.rng import rng_state
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store
from trainkit.runs.snapshot import digest
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit
from trainkit.training.state import State


class StoppingDataset:
    """Data whose fifth sample receives a signal: its handler raises `state.stop` while the sample is read."""

    classes = ("a", "b")

    def __init__(self, how: str) -> None:
        self.how, self.state = how, None

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        sample = torch.randn(3), index % 2
        if index == 4 and self.state is not None and self.how != "during the restore of RNG states":
            self.state.stop = Stopped(15)
            if self.how == "raised":
                raise self.state.stop
            try:
                raise self.state.stop
            except:  # noqa: E722  # some data sets do this
                return torch.zeros(3), 0
        return sample


@pytest.mark.parametrize("how", ["raised", "swallowed", "during the restore of RNG states"])
def test_a_stop_while_a_sample_is_read_keeps_the_rng_states_and_the_weights(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    state = make_state(model, nn.CrossEntropyLoss())
    data = StoppingDataset(how)
    loader = make_loader(Store.of(data), Prepare(torch.device("cpu")), batch_size=2, seed=None)
    seen: list[Any] = []

    class Watch:
        def on_step(self, state: State) -> None:
            seen.append(digest({"rng": rng_state(), "model": dict(state.objects.model.state_dict())}))
            if state.progress.step == 2:
                data.state = state  # type: ignore[assignment]

    set_state = torch.set_rng_state

    def interrupted(value: Any) -> None:
        if state.stop is None and state.progress.step == 2:
            state.stop = Stopped(15)
            raise state.stop
        set_state(value)

    if how.startswith("during"):
        monkeypatch.setattr(torch, "set_rng_state", interrupted)
    with pytest.raises(Stopped):
        fit(state, loader, hooks=[Watch()])
    assert state.progress.batch == state.progress.step == 2
    assert digest({"rng": rng_state(), "model": dict(state.objects.model.state_dict())}) == seen[-1]


def test_a_stop_in_validation_restores_the_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.get_buffer("seen").add_(1)
            outputs: torch.Tensor = self.linear(x)
            return outputs

    state = make_state(Counting(), nn.CrossEntropyLoss())
    data = StoppingDataset("raised")
    data.state = state  # type: ignore[assignment]
    with pytest.raises(Stopped):
        evaluate(state, make_loader(Store.of(data), Prepare(torch.device("cpu")), batch_size=2, seed=None))
    assert state.objects.model.get_buffer("seen").item() == 0

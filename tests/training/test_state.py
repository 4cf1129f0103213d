"""Hooks may read and set the fields of a state's parts by their short names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from tests.helpers import CPU, loss_case, make_loader_of, make_state
from trainkit.training.loop import fit


def test_short_names_read_and_set_the_fields_of_the_parts() -> None:
    state: Any = make_state(nn.Linear(2, 1), nn.MSELoss(), clip_norm=2.0, ema=0.9)
    assert (state.clip_norm, state.seen, state.grad_norm, state.device) == (2.0, 0, None, CPU)
    assert state.ema is state.objects.ema
    assert list(state.optimizers) == ["optim"]
    state.clip_norm, state.seen, state.watch = 0.5, 7, {}
    assert (state.settings.clip_norm, state.progress.seen, state.objects.watch) == (0.5, 7, {})
    assert copy.copy(state).settings is state.settings


def test_an_unknown_name_is_an_error_when_it_is_read_or_set() -> None:
    state: Any = make_state(nn.Linear(2, 1), nn.MSELoss())
    with pytest.raises(AttributeError, match="no 'clip_nrom'"):
        _ = state.clip_nrom
    with pytest.raises(AttributeError, match="no 'clip_nrom' to set"):
        state.clip_nrom = 1.0


def test_a_hook_can_end_the_training_after_an_epoch() -> None:
    class Stop:
        def on_epoch(self, state: Any, metrics: dict[str, Any]) -> None:  # noqa: ARG002
            state.epochs = state.epoch

    model, loss_fn, inputs, targets = loss_case("mse")
    state = make_state(model, loss_fn, epochs=5)
    fit(state, make_loader_of(inputs, targets, 16), hooks=[Stop()])
    assert state.progress.epoch == 1

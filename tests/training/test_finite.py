"""Non-finite losses and gradients: they stop the training, or the batch is skipped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    MetricsCollector,
    loss_case,
    make_loader_of,
    make_state,
)
from trainkit.core.errors import NonFiniteError
from trainkit.runs.snapshot import capture_state, digest
from trainkit.training.loop import fit
from trainkit.training.state import State


class Poisoned(nn.Module):
    """A linear model with batch norm whose output is NaN for inputs above 100."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.linear(self.norm(x))
        return outputs * torch.where(x.amax() > 100, math.nan, 1.0)


def poisoned(bad: list[int], **more: Any) -> tuple[State, Any]:
    """Return the state and the loader of 40 samples in batches of 4, in order; the `bad` samples cause NaN."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 6), torch.randint(0, 5, (40,))
    inputs[bad] = 1000.0
    model = Poisoned()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all"}], lr=0.1, momentum=0.9)
    state = make_state(model, nn.CrossEntropyLoss(), optimizer=optimizer, **more)
    return state, make_loader_of(inputs, targets, 4, seed=None)


def test_the_training_stops_before_a_non_finite_step_changes_the_weights_and_names_the_step() -> None:
    state, loader = poisoned([22])
    weights: list[torch.Tensor] = []

    class Keep:
        def on_step(self, state: State) -> None:
            weights[:] = [p.detach().clone() for p in state.objects.model.parameters()]

    with pytest.raises(NonFiniteError) as caught:
        fit(state, loader, hooks=[Keep()])
    message = str(caught.value)
    assert "step 6: the loss is nan, the gradient is not finite in param group all" in message
    assert "(batch 6 of epoch 1, samples 20, 21, 22, 23)" in message
    assert all(torch.equal(p, kept) for p, kept in zip(state.objects.model.parameters(), weights, strict=True))


def test_the_error_names_the_sample_with_non_finite_inputs() -> None:
    state, loader = poisoned([])
    loader.tensors[0][17, 3] = math.inf
    with pytest.raises(NonFiniteError, match="samples 16, 17, 18, 19; the inputs of sample 17 are not finite"):
        fit(state, loader)


def test_a_gradient_norm_that_overflows_does_not_stop_the_training() -> None:
    model = nn.Linear(2, 1, bias=False)
    state = make_state(model, nn.L1Loss())
    fit(state, make_loader_of(torch.full((2, 2), 3e19), torch.zeros(2, 1), 2))
    assert state.progress.epoch == 1
    assert state.progress.grad_norm is not None
    assert state.progress.grad_norm.isinf()


def test_skip_equals_a_training_without_the_non_finite_batches() -> None:
    state, loader = poisoned([9, 10, 30], on_nonfinite="skip", ema=0.9)
    seen: list[dict[str, Any]] = []

    class Keep:
        def on_epoch(self, _: State, metrics: dict[str, Any]) -> None:
            seen.append(metrics)

    fit(state, loader, hooks=[Keep()])
    without, _ = poisoned([], ema=0.9)
    kept = [row for row in range(40) if row // 4 not in (2, 7)]
    inputs, targets = (tensor[kept] for tensor in loader.tensors)
    fit(without, make_loader_of(inputs, targets, 4, seed=None))
    mine, theirs = capture_state(state, {}), capture_state(without, {})
    for key in ("model", "optimizers", "ema", "step"):
        assert digest({key: mine[key]}) == digest({key: theirs[key]}), key
    assert seen[0]["train/skipped"] == 2
    assert seen[0]["train/samples"] == 32
    assert seen[0]["step"] == 8
    assert without.best is not None
    assert seen[0]["train/loss"] == without.best["train/loss"]


def test_skip_stops_after_too_many_batches_of_an_epoch() -> None:
    state, _ = poisoned([], on_nonfinite="skip")
    loader = make_loader_of(torch.full((40, 6), 1000.0), torch.zeros(40, dtype=torch.long), 2)
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        fit(state, loader)
    assert state.progress.batch == 10


def test_a_batch_with_ignored_targets_only_does_not_stop_the_training() -> None:
    state, loader = poisoned([])
    loader.tensors[1][4:8] = -100  # a batch whose every target is ignored
    fit(state, loader)
    assert state.progress.epoch == 1


def test_a_non_finite_loss_is_reported_and_ends_the_training_if_steps_are_not_checked() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    inputs[5] = math.inf
    seen: list[dict[str, Any]] = []
    state = make_state(model, loss_fn)
    state.settings = replace(state.settings, check_steps=False)  # as on an accelerator
    with pytest.raises(NonFiniteError, match=r"train/loss is (nan|inf)"):
        fit(state, make_loader_of(inputs, targets, 8), hooks=[MetricsCollector(seen)])
    assert not math.isfinite(seen[0]["train/loss"])


@pytest.mark.parametrize(
    ("is_checked", "words"), [(True, "step 1: the gradient is not finite"), (False, "grad_norm is")]
)
def test_a_non_finite_gradient_ends_the_training(is_checked: bool, words: str) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.sqrt() + 0 * x

    state = make_state(Root(), nn.MSELoss())
    state.settings = replace(state.settings, check_steps=is_checked)
    with pytest.raises(NonFiniteError, match=words):
        fit(state, make_loader_of(torch.ones(4, 1), torch.ones(4, 1), 4))

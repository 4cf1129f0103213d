"""The training step: closures, clipping, micro batches, and the gradients that it reports."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    SAMPLES,
    MetricsCollector,
    loss_case,
    loss_in_float64,
    make_loader_of,
    make_state,
)
from trainkit.data.loaders import epoch_order
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit, train_epoch


def test_an_optimizer_without_a_learning_rate_trains() -> None:
    class Signs(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"alpha": 0.01})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
            for p in self.param_groups[0]["params"]:
                p.data -= 0.01 * p.grad.sign()

    model, loss_fn, inputs, targets = loss_case("cross entropy")
    seen: list[dict[str, Any]] = []
    state = make_state(model, loss_fn, optimizer=Signs(model.parameters()))
    fit(state, make_loader_of(inputs, targets, 16), hooks=[MetricsCollector(seen)])
    assert not [name for name in seen[0] if name.startswith("lr/")]


def test_a_batch_of_sparse_and_0d_tensors_trains_and_validates_if_it_is_not_split() -> None:
    class Graph(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            outputs: Tensor = batch["adjacency"] @ super().forward(batch["features"]) * batch["scale"]
            return outputs

    class OneBatch:
        samples = 5

        def __len__(self) -> int:
            return 1

        def batches(self, epoch: int, start: int = 0) -> Any:  # noqa: ARG002
            adjacency = torch.eye(5).to_sparse()
            yield {"features": torch.ones(5, 3), "adjacency": adjacency, "scale": torch.tensor(2.0)}, torch.arange(5)

    torch.manual_seed(0)
    model, loss_fn = Graph(3, 5), nn.CrossEntropyLoss()
    expected = loss_fn(2 * (torch.ones(5, 3) @ model.weight.T + model.bias), torch.arange(5)).item()
    loader: Any = OneBatch()
    state = make_state(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert evaluate(state, loader)["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert train_epoch(state, loader, [])["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_lbfgs_reports_the_loss_of_its_first_evaluation() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    before = loss_in_float64(model, loss_fn, inputs, targets)
    by_hand = copy.deepcopy(model)
    params = [{"params": list(model.parameters()), "name": "default"}]
    state = make_state(model, loss_fn, optimizer=torch.optim.LBFGS(params, max_iter=5))
    metrics = train_epoch(state, make_loader_of(inputs, targets, SAMPLES), [])
    assert metrics["train/loss"] == pytest.approx(before, rel=1e-6)

    optimizer = torch.optim.LBFGS(by_hand.parameters(), max_iter=5)
    order = epoch_order(SAMPLES, 0, 0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(by_hand(inputs[order]), targets[order])
        loss.backward()
        return loss

    optimizer.step(closure)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_clip_norm_clips_the_norm_over_all_parameters_and_reports_the_norm_before() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    free = copy.deepcopy(model)
    fit(make_state(free, loss_fn), make_loader_of(inputs, targets, SAMPLES))
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in free.parameters() if p.grad is not None))
    state = make_state(model, loss_fn, clip_norm=0.5)
    seen: list[dict[str, Any]] = []
    fit(state, make_loader_of(inputs, targets, SAMPLES), hooks=[MetricsCollector(seen)])
    clipped = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert clipped == pytest.approx(0.5, rel=1e-4)
    assert seen[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_clip_value_clips_each_element() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    fit(make_state(model, loss_fn, clip_value=1e-3), make_loader_of(inputs, targets, SAMPLES))
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) == pytest.approx(1e-3)


def test_no_forward_pass_is_larger_than_the_micro_batch() -> None:
    sizes: list[int] = []

    class Sees(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    _, loss_fn, inputs, targets = loss_case("cross entropy")
    state = make_state(Sees(6, 5), loss_fn, micro_batch=4)
    wanted = loss_in_float64(state.objects.model, loss_fn, inputs, targets)
    sizes.clear()
    seen: list[dict[str, Any]] = []
    val = make_loader_of(inputs, targets, 32, seed=None)
    fit(state, make_loader_of(inputs, targets, 32), val, hooks=[MetricsCollector(seen)])
    assert max(sizes) == 4
    assert seen[0]["val/loss"] == pytest.approx(wanted, rel=1e-6)


def test_reported_gradients_are_those_before_clipping_and_the_update() -> None:
    model, loss_fn, inputs, targets = loss_case("mse")
    params = [{"params": list(model.parameters()), "name": "default"}]
    # This optimizer changes the gradients in its step.
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9, nesterov=True, foreach=True)
    seen: list[dict[str, Any]] = []
    by_hand = copy.deepcopy(model)
    more: dict[str, Any] = {"optimizer": optimizer, "watch": {"weight": model.weight}, "clip_norm": 0.1}
    fit(
        make_state(model, loss_fn, **more),
        make_loader_of(inputs, targets, SAMPLES, seed=None),
        hooks=[MetricsCollector(seen)],
    )
    loss_fn(by_hand(inputs), targets).backward()
    assert seen[0]["grad/weight"] == pytest.approx(float(by_hand.weight.grad.norm()), rel=1e-6)
    norm = nn.utils.get_total_norm([p.grad for p in by_hand.parameters()])
    assert seen[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)

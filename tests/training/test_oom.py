"""Memory errors: the step is repeated in smaller micro batches, or the run ends with a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Command
from tests.helpers import SAMPLES, compose_settings, loss_case, make_loader_of, make_state
from trainkit.build import session as build
from trainkit.core.errors import OutOfMemoryError
from trainkit.display.text import oom_line
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit, train_epoch
from trainkit.training.state import State

LOSSES = ["cross entropy", "class weights", "ignore_index"]


class Small(nn.Module):
    """A model that runs out of memory with more than `limit` samples, from its forward pass number `begins` on."""

    def __init__(self, inner: nn.Module, limit: int, begins: int = 1, message: str = "CUDA out of memory") -> None:
        super().__init__()
        self.inner, self.limit, self.begins, self.message = inner, limit, begins, message
        self.passes = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        if self.passes >= self.begins and len(inputs) > self.limit:
            if "CUDA" in self.message:
                raise torch.OutOfMemoryError(self.message)
            raise RuntimeError(self.message)
        outputs: Tensor = self.inner(inputs)
        return outputs


def pair(name: str, wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module, nn.Module, Tensor, Tensor]:
    """Return a model and its wrapped copy, the loss, the inputs and the targets, in float64."""
    model, loss_fn, inputs, targets = loss_case(name)
    again, _, _, _ = loss_case(name)
    again.load_state_dict(model.state_dict())
    return model.double(), wrap(again.double()), loss_fn.double(), inputs.double(), targets


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_that_does_not_fit_is_split_without_changing_the_weights(name: str) -> None:
    whole, small, loss_fn, inputs, targets = pair(name, lambda model: Small(model, 5, begins=2))
    wanted = train_epoch(make_state(whole, loss_fn, lr=1e-2), make_loader_of(inputs, targets, 16), [])
    state = make_state(small, loss_fn, lr=1e-2, on_oom="split")
    metrics = train_epoch(state, make_loader_of(inputs, targets, 16), [])
    assert state.progress.micro_batch == 4  # 16, 8, 4: in the middle of the epoch
    assert state.progress.step == 3
    assert metrics["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-12)
    for ours, theirs in zip(small.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_a_memory_error_in_backward_leaves_no_partial_gradient() -> None:
    class Once(torch.autograd.Function):
        fails = True

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
            if Once.fails:
                Once.fails = False
                raise torch.OutOfMemoryError("out of memory")
            return grad

    class Fails(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self[1](Once.apply(self[0](x)))
            return out

    torch.manual_seed(0)
    first, second = nn.Linear(6, 6).double(), nn.Linear(6, 5).double()
    plain = nn.Sequential(first, second)
    failing = Fails(nn.Linear(6, 6), nn.Linear(6, 5)).double()
    failing.load_state_dict(plain.state_dict())
    _, loss_fn, inputs, targets = loss_case("cross entropy")
    for model, on_oom in ((plain, "stop"), (failing, "split")):
        state = make_state(model, loss_fn, lr=0.1, on_oom=on_oom)
        train_epoch(state, make_loader_of(inputs.double(), targets, 16), [])
    assert not Once.fails
    for ours, theirs in zip(failing.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_split_evaluation_counts_each_sample_once() -> None:
    whole, small, loss_fn, inputs, targets = pair("class weights", lambda model: Small(model, 5))
    wanted = evaluate(make_state(whole, loss_fn), make_loader_of(inputs, targets, 16, seed=None))
    split = evaluate(make_state(small, loss_fn, on_oom="split"), make_loader_of(inputs, targets, 16, seed=None))
    assert split == pytest.approx(wanted, rel=1e-12)


def test_batch_statistics_count_a_repeated_batch_once() -> None:
    class Fails(nn.Linear):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                self.fails = False
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    norm = nn.BatchNorm1d(6)
    _, loss_fn, inputs, targets = loss_case("cross entropy")
    state = make_state(nn.Sequential(norm, Fails(6, 5)), loss_fn, on_oom="split")
    train_epoch(state, make_loader_of(inputs[:16], targets[:16], 16), [])
    assert norm.num_batches_tracked == 2  # the two halves


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_on_oom_stop_ends_with_a_smaller_micro_batch_as_the_hint(message: str) -> None:
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    with pytest.raises(OutOfMemoryError, match="micro_batch=8; the results do not change") as caught:
        fit(make_state(Small(model, 5, message=message), loss_fn), make_loader_of(inputs, targets, 16))
    assert caught.value.exit_code == 8


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    with pytest.raises(OutOfMemoryError, match="ran out of memory"):
        fit(make_state(Small(model, 0), loss_fn, on_oom="split"), make_loader_of(inputs, targets, 16))


def test_a_step_is_not_repeated_once_the_update_may_have_begun() -> None:
    class Heavy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # noqa: ARG002
            raise torch.OutOfMemoryError("out of memory")

    model, loss_fn, inputs, targets = loss_case("cross entropy")
    optimizer = Heavy([{"params": list(model.parameters()), "name": "default"}], lr=0.1)
    with pytest.raises(OutOfMemoryError):
        fit(make_state(model, loss_fn, optimizer=optimizer, on_oom="split"), make_loader_of(inputs, targets, 16))


def test_other_errors_are_not_memory_errors() -> None:
    model, loss_fn, inputs, targets = loss_case("cross entropy")
    with pytest.raises(RuntimeError, match="no such thing"):
        fit(
            make_state(Small(model, 5, message="no such thing"), loss_fn, on_oom="split"),
            make_loader_of(inputs, targets, 16),
        )


def test_hooks_are_called_after_a_split() -> None:
    calls: list[tuple[int, int | None]] = []

    class Hook:
        def on_split(self, state: State) -> None:
            calls.append((state.progress.step, state.progress.micro_batch))

    model, loss_fn, inputs, targets = loss_case("cross entropy")
    state = make_state(Small(model, 9, begins=2), loss_fn, on_oom="split")
    fit(state, make_loader_of(inputs, targets, 16), hooks=[Hook()])
    assert calls == [(1, 8)]
    assert state.progress.step == -(-SAMPLES // 16)


def test_the_hint_of_a_memory_error_mentions_batch_statistics() -> None:
    _, loss_fn, inputs, targets = loss_case("cross entropy")
    norm = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5))
    with pytest.raises(OutOfMemoryError, match="batch norm computes its statistics per micro batch"):
        fit(make_state(Small(norm, 5), loss_fn), make_loader_of(inputs, targets, 16))
    state = make_state(Small(norm, 9), loss_fn, on_oom="split")
    fit(state, make_loader_of(inputs, targets, 16))
    assert "layers with batch statistics see" in oom_line(state)


def test_on_oom_auto_splits_unless_a_layer_takes_batch_statistics(here: Path) -> None:  # noqa: ARG001
    assert build.build_session(compose_settings([])).state.settings.on_oom == "split"
    for asked, wanted in (("auto", "stop"), ("split", "split")):
        assert make_state(nn.Sequential(nn.BatchNorm2d(3)), nn.MSELoss(), on_oom=asked).settings.on_oom == wanted


MODULE = """
import torch
from trainkit.models import ToyCNN

class Small(ToyCNN):
    def forward(self, x):
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)
"""


def test_the_command_reports_a_split_or_stops_with_exit_code_8(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "smallmodels.py").write_text(MODULE)
    asked = ["model._target_=smallmodels.Small", "epochs=1", "limit_batches=2"]
    done = forked(*asked, "hydra.run.dir=split")
    assert done.returncode == 0, done.stderr
    assert "out of memory at step 1: the step is repeated with micro_batch=16" in done.stderr
    assert "micro_batch=8" in (tmp_path / "split/trainkit.log").read_text()
    stopped = forked(*asked, "on_oom=stop", "hydra.run.dir=stop")
    assert stopped.returncode == 8
    assert "set micro_batch=16" in stopped.stderr
    assert json.loads((tmp_path / "stop/run.json").read_text())["exit_code"] == 8

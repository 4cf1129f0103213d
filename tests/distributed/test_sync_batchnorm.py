"""Batch norm on several ranks uses the statistics of the whole batch, as one process does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.helpers import Case, Outcome, largest_difference, train_cases
from tests.processes import Forks
from trainkit.build.last_batch import check_shares, forward_sizes
from trainkit.core.errors import ConfigError
from trainkit.core.ranks import ALONE
from trainkit.training.sync_batchnorm import is_synced, sync_batchnorm

NETS = """
import os

import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return x + self.last(self.conv(self.norm(x)).relu())

class Net(nn.Module):
    "A residual network with every kind of batch norm."

    def __init__(self, affine=True):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6, affine=affine)
        self.second, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None)
        self.head, self.norm3 = nn.Linear(6, 10), nn.BatchNorm1d(10, track_running_stats=False)
        self.deep = nn.BatchNorm3d(1)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = self.deep((x + self.norm2(self.second(x)))[:, None])[:, 0].relu()
        x = self.head(x.mean((2, 3)))
        return self.norm3(x) if self.training else x

class Deep(nn.Module):
    "Blocks that the backward pass computes again."

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 1), nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3)).repeat(1, 2)

class Fails(nn.Module):
    "A layer that fails on rank 1 in step 3, before the batch norm of the other rank has its statistics."

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == 3 and os.environ.get("RANK") == "1":
            raise torch.OutOfMemoryError("out of memory") if self.kind == "memory" else ValueError("bad sample")
        return x

def failing(kind):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10), Fails(kind), nn.BatchNorm1d(10))

class Ignoring(nn.Module):
    "A mean over the targets that are not negative, which are missing in the whole share of a rank."

    def forward(self, outputs, targets):
        kept = targets >= 5
        return nn.functional.cross_entropy(outputs[kept], targets[kept])

    def denominator(self, targets):
        return (targets >= 5).sum()
"""
DATA = ["data=synthetic", "data.train.size=106", "data.train.shape=[3,4,4]", "data.split=0.2", "batch_size=20"]
NET = ["model._target_=nets.Net", "epochs=2", *DATA]
RECOMPUTED = ["loss._target_=nets.Ignoring", "activation_checkpointing=blocks"]
CASES = {
    "plain": Case([*NET, "clip_norm=1", "ema=0.9"], "float64"),
    "single": Case([*NET, "+model.affine=false"]),
    "ignoring": Case([*NET, "loss._target_=nets.Ignoring", "data.shuffle=off", "batch_size=9"], "float64"),
    "recomputed": Case(["model._target_=nets.Deep", "epochs=2", *DATA, *RECOMPUTED], "float64"),
}
FAULTS = {
    "error": Case(["model._target_=nets.failing", "+model.kind=error", "epochs=1", *DATA]),
    "memory": Case(["model._target_=nets.failing", "+model.kind=memory", "epochs=1", "on_oom=split", *DATA]),
    "off": Case([*NET, "sync_batchnorm=off"], "float64"),
    "empty share": Case([*NET, "batch_size=21"]),
}


def trained(forks: Forks, folder: Path, ranks: int, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Train cases with the networks above."""
    (folder / "nets.py").write_text(NETS)
    return train_cases(forks, ranks, cases, folder)


@pytest.fixture(scope="module")
def alone(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The cases in one process."""
    return trained(forks, tmp_path_factory.mktemp("alone"), 1, CASES)


def check_equal(alone: dict[str, Outcome], several: dict[str, Outcome], ranks: int) -> None:
    """Compare weights, running statistics, optimizer states and histories."""
    for name, case in CASES.items():
        outcome = several[name]
        assert outcome.codes == [0] * ranks, outcome.errors
        bound = 1e-10 if case.dtype == "float64" else 1e-3
        for state in outcome.states:
            for key in ("model", "optimizers", "ema"):
                difference = largest_difference(state["objects"][key], alone[name].states[0]["objects"][key])
                assert difference < bound, (name, key)
        for row, expected in zip(outcome.history, alone[name].history, strict=True):
            for key in ("train/loss", "val/loss", "grad_norm"):
                assert row[key] == pytest.approx(expected[key], rel=bound), (name, key)


@pytest.fixture(scope="module")
def pair(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The cases on two ranks."""
    return trained(forks, tmp_path_factory.mktemp("pair"), 2, CASES | FAULTS)


def test_two_ranks_have_the_weights_and_running_statistics_of_one_process(
    alone: dict[str, Outcome], pair: dict[str, Outcome]
) -> None:
    check_equal(alone, pair, 2)


@pytest.mark.slow
def test_four_ranks_have_the_weights_and_running_statistics_of_one_process(
    forks: Forks, tmp_path: Path, alone: dict[str, Outcome]
) -> None:
    check_equal(alone, trained(forks, tmp_path, 4, CASES), 4)


def test_an_error_between_two_batch_norm_layers_ends_all_ranks_with_its_cause(pair: dict[str, Outcome]) -> None:
    assert pair["error"].codes == [1, 1]
    assert "ValueError: bad sample" in pair["error"].errors[0]
    assert "rank 1" in pair["error"].errors[0]


def test_all_ranks_split_the_step_if_memory_runs_out_between_two_batch_norm_layers(pair: dict[str, Outcome]) -> None:
    outcome = pair["memory"]
    assert outcome.codes == [0, 0], outcome.errors
    assert largest_difference(outcome.states[0], outcome.states[1]) == 0
    assert len(outcome.history) == 1


def test_without_sync_the_running_statistics_are_those_of_rank_0(
    alone: dict[str, Outcome], pair: dict[str, Outcome]
) -> None:
    first, second = (state["objects"]["model"] for state in pair["off"].states)
    assert largest_difference(first, second) == 0
    assert largest_difference(first, alone["plain"].states[0]["objects"]["model"]) > 1e-6
    log = (pair["off"].directory / "trainkit.log").read_text()
    assert "see the share of each rank, so the results depend on the number of ranks" in log


def test_a_batch_with_fewer_samples_than_ranks_is_refused_before_the_first_step(pair: dict[str, Outcome]) -> None:
    assert pair["empty share"].codes == [2, 2]
    assert "a batch of 1 sample: batch norm" in pair["empty share"].errors[0]
    assert "data.drop_last=on" in pair["empty share"].errors[0]
    assert not pair["empty share"].directory.exists()


# --------------------------------------------------------------------------------------- without ranks


def test_only_the_classes_of_torch_are_synced_and_all_their_parts_stay() -> None:
    class Custom(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Custom(3), nn.InstanceNorm2d(3, track_running_stats=True))
    calls: list[Any] = []
    model[0].register_forward_hook(lambda *call: calls.append(call))
    params, names = list(model.parameters()), list(model.state_dict())
    sync_batchnorm(model, ALONE)
    assert [is_synced(module) for module in model] == [True, False, False]
    assert all(one is other for one, other in zip(model.parameters(), params, strict=True))
    assert list(model.state_dict()) == names
    assert type(model[0]).__name__ == "BatchNorm2d"
    assert isinstance(model[0], nn.BatchNorm2d)
    model(torch.randn(4, 3, 5, 5))
    assert len(calls) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_layer_normalizes_alone(duplicate: Any) -> None:
    layer = nn.BatchNorm1d(3)
    sync_batchnorm(layer, ALONE)
    assert is_synced(layer)
    assert not is_synced(duplicate(layer))


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 2)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_one_rank_has_the_outputs_and_gradients_of_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    own = kind(3, **options).double()
    torchs = copy.deepcopy(own)
    sync_batchnorm(own, ALONE)
    for _ in range(2):
        results = []
        inputs = torch.randn(shape, dtype=torch.float64) * 3 + 100
        weights = torch.randn(shape, dtype=torch.float64)
        for layer in (own, torchs):
            leaf = inputs.clone().requires_grad_()
            layer.zero_grad()
            (layer(leaf) * weights).sum().backward()
            results.append([leaf.grad, *(param.grad for param in layer.parameters()), *layer.buffers()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_half_precision_keeps_its_dtype() -> None:
    layer = nn.BatchNorm2d(3)
    sync_batchnorm(layer, ALONE)
    inputs = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    output = layer(inputs)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("batches", "micro_batch", "ranks", "cause"),
    [
        ({20, 3}, None, 4, "a batch of 3 samples: batch norm (model.n) needs a sample on each of the 4 ranks"),
        ({3}, None, 4, "batch_size=3: batch norm"),
        ({20, 7}, 1, 2, "micro_batch=1: batch norm"),
    ],
)
def test_a_rank_without_a_sample_is_refused(batches: set[int], micro_batch: int, ranks: int, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_shares(batches, micro_batch, ranks, "n")
    assert caught.value.problems[0].cause.startswith(cause)


def test_a_share_of_one_sample_is_accepted_if_the_batch_has_two() -> None:
    check_shares({20, 2}, None, 2, "n")
    check_shares({20, 2}, 2, 2, "n")
    assert 1 in forward_sizes(22, 20, None, ranks=2)  # without sync

"""Activation checkpointing: the same numbers to the bit, and fewer saved activations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainkit
from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import ConfigError
from trainkit.optim.layers import model_blocks
from trainkit.training.recompute import recompute_blocks

ON = "activation_checkpointing=blocks"
GPT = ["model=gpt", "model.depth=3", "model.width=16", "model.heads=2", "model.dropout=0.2", "data=text"]
RESNET = ["model=torchvision.models.resnet18", "+model.num_classes=10", "data=synthetic"]
VIT = ["model=timm", "model.name=vit_tiny_patch16_224", "+model.img_size=32", "+model.drop_path_rate=0.2"]
VIT += ["data=synthetic"]
SHORT = ["epochs=2", "limit_batches=2", "batch_size=6", "progress=off", "optim=sgd"]


class Spy(nn.Module):
    """A block with dropout, batch norm and a buffer that it assigns, and whose outputs depend on the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls: Tensor = self.calls + 1
        change: Tensor = self.dropout(self.norm(self.b(torch.relu(self.a(x)))))
        return x + change / self.calls


def stack_of_spies() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(Spy(), Spy(), Spy()), nn.Linear(8, 2))


def saved_numbers(model: nn.Module, inputs: Tensor) -> int:
    """Return how many numbers autograd saves in a forward pass, apart from the parameters."""
    params = {param.data_ptr() for param in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in params:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs).sum()
    return sum(sizes.values())


def three_steps(model: nn.Module) -> list[Tensor]:
    """Return the losses, the weights and the buffers of three steps, and a random number after them."""
    torch.manual_seed(1)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        loss = model(torch.randn(5, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *model.state_dict().values(), torch.rand(())]


def train(directory: Path, overrides: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the history of a run without its clocks, and the weights."""
    run = trainkit.train(trainkit.compose([*SHORT, *overrides]), directory=directory)
    clocks = ("seconds", "samples_per_second", "tokens_per_second")
    history = [{name: value for name, value in row.items() if name not in clocks} for row in run.history]
    return history, trainkit.load(run, "last").state_dict()


def test_dropout_batch_norm_and_a_buffer_that_decides_the_outputs_give_the_same_bits() -> None:
    plain, recomputed = stack_of_spies(), stack_of_spies()
    recompute_blocks(model_blocks(recomputed))
    assert [*plain.state_dict()] == [*recomputed.state_dict()]
    for expected, found in zip(three_steps(plain), three_steps(recomputed), strict=True):
        assert torch.equal(expected, found)


def test_a_copy_of_the_model_computes_its_own_blocks() -> None:
    model = stack_of_spies()
    recompute_blocks(model_blocks(model))
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied[1][0].norm.weight)
    copied(torch.randn(5, 8)).sum().backward()
    assert copied[1][0].a.weight.grad is not None
    assert model[1][0].a.weight.grad is None


def test_autograd_saves_less() -> None:
    model, inputs = stack_of_spies(), torch.randn(64, 8)
    before = saved_numbers(model, inputs)
    recompute_blocks(model_blocks(model))
    assert saved_numbers(model, inputs) < before / 2


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [GPT, RESNET, VIT], ids=["gpt", "resnet", "vit"])
@pytest.mark.parametrize("more", [[], ["micro_batch=4", "ema=0.9", "precision=bf16", "clip_norm=1"]], ids=["", "parts"])
def test_a_run_gives_the_same_bits(overrides: list[str], more: list[str], here: Path) -> None:
    if overrides is not GPT:
        pytest.importorskip("torchvision" if overrides is RESNET else "timm")
    history, weights = train(here / "plain", [*overrides, *more])
    found, found_weights = train(here / "blocks", [*overrides, *more, ON])
    assert found == history
    assert all(torch.equal(weights[name], found_weights[name]) for name in weights | found_weights)


def test_a_resumed_run_may_switch_it_on(here: Path) -> None:
    expected, weights = train(here / "whole", GPT)
    run = trainkit.train(trainkit.compose([*SHORT, *GPT, "epochs=1"]), directory=here / "run")
    resumed = trainkit.resume(run, ["epochs=2", ON])
    assert [row["train/loss"] for row in resumed.history] == [row["train/loss"] for row in expected]
    found = trainkit.load(resumed, "last").state_dict()
    assert all(torch.equal(weights[name], found[name]) for name in weights)


def test_the_run_says_which_blocks_it_computes_again() -> None:
    session = build_session(compose_settings([*GPT, ON]))
    session.close()
    assert "activation checkpointing: the backward pass computes again 3 GPTBlock" in session.notes


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ToyCNN has no stack of blocks") as refused:
        build_session(compose_settings([ON]))
    assert "activation_checkpointing=off" in refused.value.problems[0].hint

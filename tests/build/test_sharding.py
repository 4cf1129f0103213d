"""What `distributed=fsdp` refuses before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.build.sharding import check_shardable, shard_session
from trainkit.core.errors import ConfigError
from trainkit.core.ranks import Ranks


class Tied(nn.Module):
    """Two blocks, the first of which shares a weight with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 12)
        first: Any = self.blocks[0]
        self.head.weight = first.one.weight

    def forward(self, inputs: Any) -> Any:
        hidden: Any = inputs
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)[:, :10]


class Block(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, inputs: Tensor) -> Any:
        return self.two(self.one(inputs))


class Complex(nn.Module):
    """A model with a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(12, 10, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex64) @ self.weight).abs()


class Normalized(nn.Sequential):
    """A model with batch norm."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 10), nn.BatchNorm1d(10))


def two_losses(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a loss for the only optimizer."""
    yield "optim", loss_fn(model(inputs), targets)


BASE = ["data=synthetic", "data.train.shape=[12]", "distributed=fsdp", "progress=off"]
HERE = f"{__name__}."


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["model=mlp", "precision=fp16"], "the scale of the loss in fp16"),
        (["model=mlp", "on_oom=split"], "on_oom=split"),
        (["model=mlp", "compile=true"], "compile is not supported"),
        (["model=mlp", "checkpoint.weights=trainable"], "checkpoint.weights=trainable"),
        (["model=mlp", "optim=lbfgs"], "LBFGS (optim) does not support shards"),
        (["model=mlp", "optim=muon_sgd"], "Muon (muon) does not support shards"),
        (["model=mlp", f"training_step={HERE}two_losses"], "yields several losses for a batch"),
        ([f"model._target_={HERE}Normalized"], "BatchNorm1d normalizes by batch statistics"),
        ([f"model._target_={HERE}Complex"], "weight is complex"),
        ([f"model._target_={HERE}Tied"], "is shared by a block and another part"),
    ],
)
def test_what_shards_do_not_support_is_refused_with_its_name(overrides: list[str], cause: str) -> None:
    session = build_session(compose_settings([*BASE, *overrides]), ranks=Ranks(0, 2))
    with pytest.raises(ConfigError, match="distributed=fsdp") as caught:
        check_shardable(session)
    assert cause in str(caught.value)
    assert all(problem.hint for problem in caught.value.problems)


def test_one_process_ignores_shards_and_says_so() -> None:
    session = build_session(compose_settings([*BASE, "model=mlp"]))
    check_shardable(session)
    shard_session(session)
    assert "note: distributed=fsdp has no effect on one process, which holds the whole model" in session.notes
    assert not session.state.objects.sharded

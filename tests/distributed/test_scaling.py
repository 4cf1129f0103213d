"""What `check` estimates for several devices is what their ranks exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.helpers import Case, train_cases
from tests.processes import Forks
from trainkit.config.repair import compose_and_repair
from trainkit.diagnostics.check.run import check

MODULE = """
import json
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as fsdp


class Count:
    # Count the bytes of the messages of each step.

    def on_start(self, state):
        self.sizes, self.steps = [], []
        self.wrap(dist, "all_reduce", 0)
        self.wrap(fsdp.DefaultAllGather, "__call__", 1, "output_tensor")
        self.wrap(fsdp.DefaultReduceScatter, "__call__", 2, "input_tensor")

    def wrap(self, owner, name, position, keyword="tensor"):
        function = getattr(owner, name)
        def counted(*args, **named):
            tensor = named[keyword] if keyword in named else args[position]
            self.sizes.append(tensor.nbytes)
            return function(*args, **named)
        setattr(owner, name, counted)

    def on_step(self, state):
        self.steps.append(self.sizes)
        self.sizes = []

    def on_end(self, state):
        (Path.cwd() / f"{state.directory.name}-{state.objects.ranks.rank}.json").write_text(json.dumps(self.steps))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, inputs):
        return inputs + self.other(self.one(inputs).relu())


class Blocks(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 8), nn.Sequential(Block(), Block(), Block()), nn.Linear(8, 10))
"""
COPIES = ["model=mlp", "limit_batches=4", "epochs=1", "+param_groups.fixed={name: 'fc1.*', freeze: true}"]
DATA = ["data=synthetic", "data.train.size=132", "data.train.shape=[12]", "data.split=off", "batch_size=33", "epochs=1"]
SHARDS = [*DATA, "model=blocks.Blocks", "distributed=fsdp", "micro_batch=7"]
COUNT = "+hooks.count._target_=blocks.Count"
SMALL = 100  # bytes of a sum that is no gradient, such as that of a loss


def estimated_bytes(overrides: list[str]) -> float:
    """Return the bytes that `check` estimates for a step on two devices."""
    report = check(compose_and_repair(overrides), 0.1)
    assert report.scaling is not None
    assert report.scaling.estimates[1].devices == 2
    return report.scaling.estimates[1].sent


def test_the_estimated_bytes_are_those_that_two_ranks_send(forks: Forks, here: Path) -> None:
    (here / "blocks.py").write_text(MODULE)
    outcomes = train_cases(forks, 2, {"copies": Case([*COPIES, COUNT]), "shards": Case([*SHARDS, COUNT])}, here)
    for name, overrides in {"copies": COPIES, "shards": SHARDS}.items():
        assert outcomes[name].codes == [0, 0], outcomes[name].errors
        estimated = estimated_bytes(overrides)
        for rank in range(2):
            last = json.loads((here / f"{name}-{rank}.json").read_text())[-1]
            # Over a ring, each of two ranks sends 2 (2 - 1) / 2 of the bytes of an all-reduce, and 1/2 of the others.
            of_message = 1 if name == "copies" else 1 / 2
            assert of_message * sum(size for size in last if size >= SMALL) == estimated, name
            assert of_message * sum(last) == pytest.approx(estimated, rel=0.02), name

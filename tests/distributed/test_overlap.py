"""Trainings whose gradients DDP sums during the backward pass have the numbers of those that sum afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.helpers import Case, Outcome, largest_difference, train_cases
from tests.processes import Forks

MODULE = """
import torch
from torch import nn


class Seen:
    # Whether DDP summed the gradients of the last step.

    def on_epoch(self, state, metrics):
        metrics["overlapped"] = float(state.objects.overlapped is not None)


class Partial(nn.Module):
    # A model with a layer that it never uses, and one that each rank uses in other batches.

    whole_batch = False  # the ranks compute other losses on purpose

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.sometimes = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, inputs):
        outputs = self.used(inputs)
        chosen = float(inputs.sum()) % 2 < 1
        return {"out": outputs + self.sometimes(inputs)} if chosen else {"out": outputs}


class OfMapping(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs["out"], targets)
"""
DATA = ["data=synthetic", "data.train.size=171", "data.train.shape=[12]", "data.split=0.2", "batch_size=33", "epochs=2"]
PARTIAL = ["model._target_=overlap_parts.Partial", "loss._target_=overlap_parts.OfMapping"]
CASES = {
    "plain": ["model=mlp", "ema=0.9", "clip_norm=0.5", "optim=adamw"],
    "micro batches": ["model=mlp", "micro_batch=7", "optim.momentum=0.9"],
    "two optimizers": ["model=mlp", "optim=muon_sgd"],
    "weighted": ["model=mlp", "loss.weight=[1,2,3,4,5,6,7,8,9,0]", "loss.ignore_index=3"],
    "scaled loss": ["model=mlp", "precision=fp16"],
    "parameters that a batch does not use": PARTIAL,
}
REFUSED = {
    "parameters in the loss": (
        ["model=mlp", "loss._target_=tests.distributed.parts.Shifted"],
        "the loss has parameters",
    ),
    "closure": (["model=mlp", "optim=lbfgs"], "the optimizer evaluates the loss itself"),
    "split": (["model=mlp", "on_oom=split"], "on_oom=split repeats steps"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "overlap_parts.py").write_text(MODULE)
    return tmp_path


def train_both(forks: Forks, folder: Path, ranks: int, chosen: dict[str, list[str]]) -> dict[str, list[Outcome]]:
    """Train cases with `auto` and with `ddp`; return both outcomes of each case."""
    hook = ["+hooks.seen._target_=overlap_parts.Seen"]
    cases = {
        f"{name} {kind}": Case([*DATA, *hook, *overrides, f"distributed={kind}"])
        for name, overrides in chosen.items()
        for kind in ("auto", "ddp")
    }
    outcomes = train_cases(forks, ranks, cases, folder)
    for name, outcome in outcomes.items():
        assert set(outcome.codes) == {0}, (name, outcome.errors)
    return {name: [outcomes[f"{name} {kind}"] for kind in ("auto", "ddp")] for name in chosen}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sums_during_the_backward_pass_give_the_same_numbers(ranks: int, forks: Forks, folder: Path) -> None:
    for name, (afterwards, during) in train_both(forks, folder, ranks, CASES).items():
        assert [row["overlapped"] for row in afterwards.history] == [0, 0], name
        assert [row["overlapped"] for row in during.history] == [1, 1], name
        first, *others = during.states
        assert all(largest_difference(other["objects"], first["objects"]) == 0 for other in others), name
        assert largest_difference(first["objects"]["model"], afterwards.states[0]["objects"]["model"]) < 1e-6, name


def test_a_training_that_ddp_cannot_sum_says_so_and_sums_afterwards(forks: Forks, folder: Path) -> None:
    chosen = {name: overrides for name, (overrides, _) in REFUSED.items()}
    for name, (afterwards, during) in train_both(forks, folder, 2, chosen).items():
        assert [row["overlapped"] for row in during.history] == [0, 0]
        note = "note: distributed=ddp: gradients are summed after the backward pass, because " + REFUSED[name][1]
        log = (during.directory / "trainkit.log").read_text()
        assert note in log
        assert "training on cpu in 2 processes: " in log
        assert largest_difference(during.states[0]["objects"], afterwards.states[0]["objects"]) == 0

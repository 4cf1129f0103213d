"""Trainings whose model is divided among the ranks have the numbers of those that copy it to each rank."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.helpers import Case, Ended, Outcome, largest_difference, run_ranks, start_ranks, train_cases
from tests.helpers import read_history
from tests.processes import Forks
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import digest

MODULE = """
import json
import os
import resource

import torch
from torch import nn


class Sequences(nn.Module):
    # A transformer over the values of a sample (N, 12), with a scalar parameter.

    def __init__(self, width=16, dropout=0.0, classes=10):
        super().__init__()
        self.embed = nn.Linear(3, width)
        layer = lambda: nn.TransformerEncoderLayer(width, 2, 27, dropout, batch_first=True)
        self.blocks = nn.ModuleList(layer() for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(width, classes)

    def forward(self, inputs):
        hidden = self.embed(inputs.reshape(len(inputs), 4, 3))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1)) * self.scale


def broken(model, inputs, targets, loss_fn):
    # The loss of two steps is NaN.
    model.steps = getattr(model, "steps", 0) + torch.is_grad_enabled()
    loss = loss_fn(model(inputs), targets)
    return loss * float("nan") if model.steps in (6, 9) else loss


class Sizes:
    # Writes how many values of the parameters and of the optimizer's state this rank holds.

    def on_end(self, state):
        params = [param for param in state.optimizer.param_groups[0]["params"] if param.dim()]
        tensors = [*params, *(state.optimizer.state[param]["momentum_buffer"] for param in params)]
        held, whole = (sum(size) for size in zip(*((t.to_local().numel(), t.numel()) for t in tensors)))
        with open(f"sizes-{os.environ['RANK']}.json", "w") as file:
            json.dump([held, whole], file)


class FullDisk:
    def on_step(self, state):
        if state.step == 3 and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def step(model, inputs, targets, loss_fn):
    outputs = model(inputs)
    loss, size = loss_fn(outputs, targets), outputs.detach().abs().mean()
    return {"loss": loss, "denominator": len(targets), "size": size, "outputs": outputs}
"""
DATA = ["data=synthetic", "data.train.size=171", "data.train.shape=[12]", "batch_size=33", "epochs=3"]
# Not Adam: the gradient of the bias of the keys is 0, and Adam would scale its rounding errors to steps.
MODEL = ["model._target_=fsdp_parts.Sequences", "optim=sgd", "optim.momentum=0.9", "lr=0.03"]
CASES = {
    "blocks": MODEL,
    "micro batches": [*MODEL, "micro_batch=7", "activation_checkpointing=blocks"],
    "average and clipping": [*MODEL, "ema=0.9", "clip_norm=0.5", "clip_value=0.05", "watch=[head.weight, scale]"],
    "parameter in the loss": [*MODEL, "loss._target_=tests.distributed.parts.Shifted", "clip_norm=0.5", "ema=0.9"],
    "custom steps": [
        *MODEL,
        "training_step=fsdp_parts.step",
        "evaluation_step=fsdp_parts.step",
        "metrics=classification",
        "micro_batch=5",
    ],
    "two optimizers": ["model=mlp", "optim=muon_sgd", "optim.muon._target_=torch.optim.AdamW"],
    "frozen parameters": [
        *MODEL,
        "+param_groups.embed={name: 'embed.*', freeze: 1}",
        "+param_groups.head={name: 'head.*', freeze: true}",
    ],
    "groups": [*MODEL, "+param_groups.head={name: 'head.*', lr: 0.01}", "scheduler=cosine"],
    "skipped batches": [*MODEL, "training_step=fsdp_parts.broken", "on_nonfinite=skip"],
    "rolled back": [
        *MODEL,
        "training_step=fsdp_parts.broken",
        "on_nonfinite=rollback",
        "checkpoint.every_steps=2",
    ],
    "state from the start": ["model=mlp", "optim=adagrad", "lr=0.03"],
    "fused adam": ["model=mlp", "optim=adamw", "ema=0.9"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fsdp_parts.py").write_text(MODULE)
    return tmp_path


def train_both(forks: Forks, ranks: int, folder: Path, names: list[str]) -> dict[str, tuple[Outcome, Outcome]]:
    """Train cases with `auto` and with `fsdp`; return both outcomes of each case."""
    cases = {
        f"{name} {kind}": Case([*DATA, *CASES[name], f"distributed={kind}"])
        for name in names
        for kind in ("auto", "fsdp")
    }
    outcomes = train_cases(forks, ranks, cases, folder)
    for name, outcome in outcomes.items():
        assert set(outcome.codes) == {0}, (name, outcome.errors)
    return {name: (outcomes[f"{name} auto"], outcomes[f"{name} fsdp"]) for name in names}


def check_equal(copied: Outcome, sharded: Outcome) -> None:
    """Check that weights, optimizer states and all metrics are equal up to the rounding of float32."""
    one, other = copied.states[0]["objects"], sharded.states[0]["objects"]
    for part in ("model", "loss", "ema"):
        assert largest_difference(other[part], one[part]) < 1e-6, part
    numbers = [
        [
            {name: value for name, value in row.items() if "second" not in name and "grad" not in name}
            for row in outcome.history
        ]
        for outcome in (sharded, copied)
    ]
    assert largest_difference(*numbers) < 1e-6
    assert all(
        row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for row, expected in zip(sharded.history, copied.history, strict=True)
    )


def test_the_numbers_of_shards_are_those_of_copies(forks: Forks, folder: Path) -> None:
    both = train_both(forks, 2, folder, ["micro batches", "average and clipping"])
    for copied, sharded in both.values():
        check_equal(copied, sharded)


@pytest.mark.slow
def test_all_parts_of_a_training_work_with_shards(forks: Forks, folder: Path) -> None:
    for name, (copied, sharded) in train_both(forks, 2, folder, [*CASES]).items():
        print(name)
        check_equal(copied, sharded)


@pytest.mark.slow
def test_four_ranks_train_with_shards_if_some_have_no_sample(forks: Forks, folder: Path) -> None:
    ((copied, sharded),) = train_both(forks, 4, folder, ["custom steps"]).values()
    check_equal(copied, sharded)


# --------------------------------------------------------------------------------------- kill and resume

DROPOUT = [*DATA, *MODEL, "model.dropout=0.1", "ema=0.9", "checkpoint.every_steps=1", "report=off", "progress=off"]
FSDP = [*DROPOUT, "distributed=fsdp"]


def last_state(folder: Path) -> dict[str, Any]:
    """Return the content of the newest checkpoint of a run."""
    return Checkpoints(folder / "checkpoints").newest()[1]


def check_ended(ended: Ended) -> None:
    assert set(ended.codes) == {0}, ended.stderr


@pytest.mark.slow
def test_a_sharded_run_that_is_killed_at_any_moment_resumes_to_the_same_bits(forks: Forks, folder: Path) -> None:
    check_ended(run_ranks(forks, 2, *FSDP, "hydra.run.dir=whole", cwd=folder))
    rng = random.Random(1)
    argv, kills = [*FSDP, "hydra.run.dir=killed"], 0
    while kills < 5:
        running = start_ranks(forks, 2, *argv, cwd=folder)
        time.sleep(rng.uniform(0.3, 2.5))
        for process in running.processes[:: rng.choice([1, -1])]:
            with contextlib.suppress(ProcessLookupError):
                process.send(signal.SIGKILL)
        running.wait()
        kills += 1
        if (folder / "killed" / "run.json").exists():
            argv = ["resume", "killed"]
    check_ended(run_ranks(forks, 2, *argv, cwd=folder))
    assert digest(last_state(folder / "killed")) == digest(last_state(folder / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("fsdp", "auto"), ("auto", "fsdp")])
def test_a_run_moves_between_shards_and_copies_inside_an_epoch(
    forks: Forks, folder: Path, first: str, then: str
) -> None:
    plain = [*DATA, *MODEL, "ema=0.9", "report=off", "progress=off"]
    check_ended(run_ranks(forks, 1, *plain, "hydra.run.dir=whole", cwd=folder))
    check_ended(
        run_ranks(forks, 2, *plain, "hydra.run.dir=run", "steps=3", "epochs=off", f"distributed={first}", cwd=folder)
    )
    more = ["resume", "run", "steps=6", f"distributed={then}"]
    check_ended(run_ranks(forks, 4 if then == "fsdp" else 1, *more, cwd=folder))
    check_ended(run_ranks(forks, 2, "resume", "run", "steps=off", "epochs=3", cwd=folder))
    moved, expected = (last_state(folder / name) for name in ("run", "whole"))
    for part in ("model", "ema"):
        assert largest_difference(moved[part], expected[part]) < 1e-5, part
    states = [saved["optimizers"]["optim"]["state"] for saved in (moved, expected)]
    assert largest_difference(*states) < 1e-5


@pytest.mark.slow
def test_one_process_reads_the_checkpoint_that_several_have_written(forks: Forks, folder: Path) -> None:
    check_ended(run_ranks(forks, 2, *FSDP, "+hooks.sizes._target_=fsdp_parts.Sizes", "hydra.run.dir=run", cwd=folder))
    sizes = [json.loads((folder / f"sizes-{rank}.json").read_text()) for rank in range(2)]
    assert sum(held for held, _ in sizes) == sizes[0][1]
    assert all(0.4 < held / whole < 0.6 for held, whole in sizes)
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    newest = checkpoints.directory / checkpoints.names()[0]
    assert {path.name for path in newest.iterdir()} == {
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
        "state.pt",
        "manifest.json",
    }
    evaluated = run_ranks(forks, 1, "eval", "run", "--json", cwd=folder)
    check_ended(evaluated)
    best = min(row["val/loss"] for row in read_history(folder / "run"))
    assert json.loads(evaluated.stdout[0])["metrics"]["val/loss"] == pytest.approx(best, rel=1e-6)
    check_ended(run_ranks(forks, 1, "export", "run", "--format", "safetensors", cwd=folder))
    check_ended(run_ranks(forks, 1, *DATA, *MODEL, "init_from=run", "epochs=1", "report=off", cwd=folder))


@pytest.mark.slow
def test_a_full_disk_of_one_rank_stops_all_and_keeps_earlier_checkpoints(forks: Forks, folder: Path) -> None:
    full = ["+hooks.full._target_=fsdp_parts.FullDisk", "hydra.run.dir=run"]
    ended = run_ranks(forks, 2, *FSDP, *full, cwd=folder)
    assert ended.codes == [6, 6], ended.stderr
    assert "rank 1 cannot write" in ended.stderr[0]
    assert "File too large" in ended.stderr[0]
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    assert checkpoints.newest()[0] == "step-00000002"
    assert [path.name for path in checkpoints.directory.iterdir() if path.name.startswith(".")] == []
    check_ended(run_ranks(forks, 2, "resume", "run", "~hooks.full", cwd=folder))

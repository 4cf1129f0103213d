"""`checkpoint.weights=trainable`: checkpoints without the frozen weights, which a resume builds again."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import trainkit
from tests.conftest import Command
from tests.engine.test_length import final
from tests.helpers import SmallCNN, small_run
from tests.processes import Forks
from trainkit.core.errors import CheckpointError
from trainkit.runs.checkpoint import Checkpoints

slow = pytest.mark.slow
TRAINABLE = "checkpoint.weights=trainable"
FROZEN = "+param_groups.body={module: [conv, body], freeze: true}"
LORA = """_target_: trainkit.adapters.lora
model: {_target_: trainkit.models.ToyCNN, in_channels: 3, num_classes: 10}
rank: 2
train: ['fc2\\..*']
"""
RUN = ["model=small_lora", "limit_batches=6", "epochs=3", "progress=plain", "optim=adamw", "checkpoint.every_steps=4"]
RUN += [TRAINABLE, "init_from.path=base", r"init_from.missing=[.*\.parametrizations\..*]", "ema=0.9"]


def newest(run: Path) -> dict[str, Any]:
    return Checkpoints(run / "checkpoints").newest()[1]


def train(directory: Path, *more: str) -> Any:
    return trainkit.train(trainkit.compose(small_run(SmallCNN, *more)), directory=directory)


@pytest.mark.parametrize("step", [13, pytest.param(5, marks=slow)])
def test_a_killed_lora_run_resumes_to_the_same_bits_from_checkpoints_with_the_adapter_alone(
    step: int, forked: Command, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "small_lora.yaml").write_text(LORA)
    assert forked("limit_batches=6", "epochs=1", "progress=off", "hydra.run.dir=base").returncode == 0
    done = forked(*RUN, "hydra.run.dir=straight")
    assert done.returncode == 0, done.stderr
    hook = f"+hooks.kill={{_target_: trainkit.diagnostics.verify_resume.Kill, step: {step}}}"
    process = forks.start(*RUN, hook, "hydra.run.dir=resumed", cwd=tmp_path)
    assert process.wait() == -signal.SIGKILL, process.stderr
    saved = newest(tmp_path / "resumed")
    assert {name for name in saved["model"] if not name.startswith("fc2.")} == {
        f"{layer}.parametrizations.weight.0.{part}"
        for layer in ("conv1", "conv2", "conv3", "fc1")
        for part in ("up", "down")
    }
    assert not any(name.endswith(".original") for name in saved["ema"])
    done = forked("resume", "resumed", "~hooks.kill")
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "resumed") == final(tmp_path / "straight")


@pytest.mark.parametrize("ema", [[], ["ema=0.9"]])
def test_the_numbers_and_the_loaded_model_are_those_of_a_run_with_whole_checkpoints(
    ema: list[str], tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", FROZEN, "epochs=2", *ema)
    partial = train(tmp_path / "partial", FROZEN, TRAINABLE, "epochs=2", *ema)
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert [row.get(key) for row in whole.history] == [row.get(key) for row in partial.history]
    assert set(newest(partial.directory)["model"]) == {"head.weight", "head.bias"}
    ours, theirs = trainkit.load(partial), trainkit.load(whole)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_buffers_stay_in_the_checkpoints(tmp_path: Path) -> None:
    overrides = ["model=torchvision", "model.name=resnet18", "limit_batches=2", "epochs=1", "progress=off", TRAINABLE]
    run = trainkit.train(
        trainkit.compose([*overrides, "+param_groups.all={module: [layer1, bn1], freeze: true}"]),
        directory=tmp_path / "run",
    )
    saved = newest(run.directory)["model"]
    assert "bn1.running_mean" in saved
    assert "bn1.weight" not in saved
    assert torch.equal(trainkit.load(run).state_dict()["bn1.running_mean"], saved["bn1.running_mean"])


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    torch.save(SmallCNN().state_dict(), tmp_path / "weights.pt")
    run = train(tmp_path / "run", FROZEN, TRAINABLE, f"init_from={tmp_path / 'weights.pt'}")
    state = SmallCNN().state_dict()
    torch.save(state | {"conv.weight": state["conv.weight"] + 1}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="the frozen weights that the config builds are not those of this run"):
        trainkit.resume(run, ["epochs=2"])
    with pytest.raises(CheckpointError, match="the frozen weights"):
        trainkit.load(run)


def test_the_kind_of_checkpoints_may_change_in_both_directions(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", FROZEN, "epochs=3")
    run = train(tmp_path / "run", FROZEN, TRAINABLE)
    run = trainkit.resume(run, ["epochs=2", "checkpoint.weights=all"])
    assert "conv.weight" in newest(run.directory)["model"]
    run = trainkit.resume(run, ["epochs=3", TRAINABLE])
    assert "conv.weight" not in newest(run.directory)["model"]
    for name, value in trainkit.load(straight, "last").state_dict().items():
        assert torch.equal(trainkit.load(run, "last").state_dict()[name], value), name


def test_frozen_weights_that_the_config_cannot_build_again_are_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "init_from.path=off")  # trains all weights
    allow = "resume.allow=[param_groups]"
    with pytest.raises(CheckpointError):
        trainkit.resume(run, ["epochs=2", TRAINABLE, FROZEN, allow])
    copied = tmp_path / "copied"
    shutil.copytree(run.directory, copied)
    assert newest(copied)["model"].keys() == SmallCNN().state_dict().keys()


class ChangeFrozen:
    """A hook that writes into a frozen parameter."""

    def on_step(self, state: Any) -> None:
        if state.step == 2:
            with torch.no_grad():
                state.model.conv.weight.add_(1.0)


def test_a_change_of_a_frozen_weight_ends_the_run(tmp_path: Path) -> None:
    hook = "+hooks.change._target_=tests.engine.test_trainable_checkpoints.ChangeFrozen"
    with pytest.raises(CheckpointError, match=r"conv\.weight is frozen, but something has changed it"):
        train(tmp_path / "run", FROZEN, TRAINABLE, hook)


def test_a_rollback_keeps_the_frozen_weights(tmp_path: Path) -> None:
    common = [FROZEN, "on_nonfinite=rollback", "checkpoint.every_steps=2", "lr=0.01"]
    hook = "+hooks.nan._target_=tests.engine.test_trainable_checkpoints.NanOnce"
    whole = train(tmp_path / "whole", *common, hook)
    partial = train(tmp_path / "partial", *common, hook, TRAINABLE)
    assert whole.history[-1]["train/skipped"] == 1
    assert whole.history[-1]["train/loss"] == partial.history[-1]["train/loss"]


class NanOnce:
    """A hook that makes the weights of the head NaN once, so that the next loss is not finite."""

    def on_step(self, state: Any) -> None:
        if state.step == 3 and state.progress.skipped == 0:
            with torch.no_grad():
                state.model.head.bias.fill_(float("nan"))


def test_a_run_with_partial_checkpoints_is_a_start_for_another_run(tmp_path: Path) -> None:
    run = train(tmp_path / "run", FROZEN, TRAINABLE)
    other = train(tmp_path / "other", f"init_from={run.directory}", "lr=0")
    for name, value in trainkit.load(run).state_dict().items():
        assert torch.equal(trainkit.load(other).state_dict()[name], value), name

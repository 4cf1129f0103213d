"""Distillation: the loss of the paper, a teacher that stays as it is, and an exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trainkit
from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.distillation import Distillation
from trainkit.runs.directory import Run

TEACHER = ["model=mlp", "model.hidden=[16]", "epochs=1", "limit_batches=3", "progress=off"]
STUDENT = ["experiment=distillation", "training_step.teacher=teacher", "epochs=2", "limit_batches=3", "progress=off"]


@pytest.fixture
def teacher(here: Path) -> Run:
    """Return a trained teacher."""
    return trainkit.train(trainkit.compose(TEACHER), directory=here / "teacher")


def losses(run: Run) -> list[Any]:
    """Return the numbers of each epoch that distillation reports."""
    return [[value for name, value in row.items() if "/" in name] for row in run.history]


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights of a model."""
    return trainkit.load(run, "last").state_dict()


@pytest.mark.usefixtures("teacher")
def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    step, model, loss_fn = Distillation("teacher", 3.0, 0.7), nn.Linear(4, 10), nn.CrossEntropyLoss()
    step.teacher = nn.Linear(4, 10)
    inputs, targets = torch.randn(6, 4), torch.randint(0, 10, (6,))
    found = step(model, inputs, targets, loss_fn)
    p, q = F.softmax(step.teacher(inputs) / 3, 1), F.softmax(model(inputs) / 3, 1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(found["loss"], 0.7 * 9 * divergence + 0.3 * loss_fn(model(inputs), targets))
    found["loss"].backward()
    assert all(param.grad is None for param in step.teacher.parameters())


def test_the_teacher_is_neither_trained_nor_saved(teacher: Run, here: Path) -> None:
    before = weights(teacher)
    run = trainkit.train(trainkit.compose(STUDENT), directory=here / "student")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(teacher).items())
    assert {"train/from_teacher", "train/from_targets"} <= run.history[-1].keys()
    session = build_session(compose_settings(STUDENT))
    session.close()
    saved = session.state.objects.state_dict()["steps"]["training_step"]
    assert list(saved) == ["teacher_sha256"]


@pytest.mark.usefixtures("teacher")
def test_a_resumed_run_equals_a_run_that_was_not_stopped(here: Path) -> None:
    whole = trainkit.train(trainkit.compose(STUDENT), directory=here / "whole")
    trainkit.train(trainkit.compose([*STUDENT, "epochs=1"]), directory=here / "parts")
    parts = trainkit.resume(here / "parts", ["epochs=2"])
    assert losses(parts) == losses(whole)
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())


@pytest.mark.usefixtures("teacher")
def test_micro_batches_give_the_same_numbers(here: Path) -> None:
    whole = trainkit.train(trainkit.compose(STUDENT), directory=here / "whole")
    parts = trainkit.train(trainkit.compose([*STUDENT, "micro_batch=10"]), directory=here / "parts")
    assert torch.allclose(torch.tensor(losses(whole)), torch.tensor(losses(parts)), rtol=1e-4)


@pytest.mark.usefixtures("teacher")
def test_a_resume_with_another_teacher_is_refused(here: Path) -> None:
    run = trainkit.train(trainkit.compose([*STUDENT, "epochs=1"]), directory=here / "student")
    (here / "teacher").rename(here / "first")
    trainkit.train(trainkit.compose([*TEACHER, "seed=1"]), directory=here / "teacher")
    with pytest.raises(CheckpointError, match="its weights have changed"):
        trainkit.resume(run, ["epochs=2"])


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("training_step.teacher=last", "training_step.teacher=last: outputs/latest: this directory does not exist"),
        ("training_step.teacher=nowhere", "training_step.teacher=nowhere: nowhere: this directory does not exist"),
        ("training_step.teacher=''", "training_step.teacher='' is not the directory of a run"),
        ("training_step.teacher=null", "training_step.teacher=None is not the directory of a run"),
        ("training_step.temperature=0", "temperature=0"),
        ("training_step.alpha=2", "alpha=2"),
    ],
)
@pytest.mark.usefixtures("teacher")
def test_wrong_arguments_are_errors_of_the_config(override: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        build_session(compose_settings([*STUDENT, override]))


def test_a_teacher_without_a_checkpoint_is_named(teacher: Run) -> None:
    shutil.rmtree(teacher.directory / "checkpoints")
    with pytest.raises(CheckpointError, match=r"training_step\.teacher=teacher: .* has no best checkpoint"):
        build_session(compose_settings(STUDENT))


def test_last_is_the_newest_run_at_the_start_and_stays_the_teacher(here: Path) -> None:
    last = [*STUDENT, "training_step.teacher=last"]
    teacher = trainkit.train(trainkit.compose(TEACHER))
    run = trainkit.train(trainkit.compose([*last, "epochs=1"]))
    assert (here / "outputs/latest").resolve() == run.directory.resolve()
    parts = trainkit.resume("last", ["epochs=2"])
    whole = trainkit.train(trainkit.compose([*last, f"training_step.teacher={teacher.directory}"]), directory="whole")
    assert losses(parts) == losses(whole)
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())


@pytest.mark.usefixtures("teacher")
def test_other_classes_than_the_teachers_are_an_error(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher returns .* the model") as refused:
        trainkit.train(trainkit.compose([*STUDENT, "model.out_features=11"]), directory=here / "student")
    assert "the same classes" in refused.value.problems[0].hint

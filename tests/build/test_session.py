"""A session: what settings build, and which settings are an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trainkit
from tests.helpers import compose_settings
from trainkit import compose
from trainkit.build import session as build
from trainkit.build.model import build_loss
from trainkit.core.errors import ConfigError, UserCodeError
from trainkit.engine.error_context import explain_error
from trainkit.engine.session_facts import startup_notes
from trainkit.training.loop import fit

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def random_points(n=20):
    return TensorDataset(torch.randn(n, 1), torch.randn(n, 1))

class WithoutClasses:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.zeros(3, 32, 32), index % 3

class TwelveClasses(WithoutClasses):
    classes = 12

class UnknownMethod:
    def on_epoch_start(self, state, metrics): ...

class NoMethods: ...

def flat(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    return torch.optim.lr_scheduler.ConstantLR(optimizer)

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return ((outputs * self.scale - targets) ** 2).mean()
"""
CONFIGS = {
    "data/random.yaml": "train:\n  _target_: buildmodule.random_points\nclasses: 1\n",
    "data/without_classes.yaml": "train:\n  _target_: buildmodule.WithoutClasses\nsplit: 0.2\n",
    "loss/scaled.yaml": "_target_: buildmodule.Scaled\n",
    "model/object.yaml": "_target_: builtins.object\n",
    "optim/dict.yaml": "_target_: builtins.dict\nlr: 1\n",
    "model/norm.yaml": """
_target_: torch.nn.Sequential
_args_:
  - {_target_: torch.nn.Flatten}
  - {_target_: torch.nn.LazyBatchNorm1d}
  - {_target_: torch.nn.LazyLinear, out_features: 10}
""",
    "scheduler/flat.yaml": "_target_: buildmodule.flat\n",
}
LINE = ("data=line", "model=linear", "loss=mse")


@pytest.fixture(autouse=True)
def module(here: Path) -> None:
    (here / "buildmodule.py").write_text(MODULE)
    for name, text in CONFIGS.items():
        (here / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "conf" / name).write_text(text)


def learning_rates(session: build.Session) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in session.state.objects.optimizer.param_groups}


def test_a_split_image_folder_has_a_number_of_classes(here: Path) -> None:
    for name in "abc":
        (here / "images" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(here / "images" / name / f"{number}.png")
    session = build.build_session(compose_settings(["data=image_folder", "data.root=images", "data.num_workers=0"]))
    assert session.val is not None
    assert (session.train.samples, session.val.samples) == (12, 3)
    assert session.state.objects.model.fc2.out_features == 3


def test_random_data_depends_on_the_seed() -> None:
    losses = []
    for seed in (0, 0, 1):
        run = trainkit.train(compose([*LINE, "data=random", f"seed={seed}", "epochs=1", "progress=off"]))
        losses.append(run.history[0]["train/loss"])
    assert losses[0] == losses[1] != losses[2]


def test_learnable_parameters_of_the_loss_are_trained() -> None:
    rule = "+param_groups.s={name: 'loss.*', lr_mult: 0.1}"
    settings = compose_settings(["data=line", "model=linear", "loss=scaled", rule])
    session = build.build_session(settings)
    fit(session.state, session.train)
    assert session.state.objects.loss_fn.scale != 1
    assert learning_rates(session) == {"s": pytest.approx(0.001), "default": 0.01}


def test_lists_and_numbers_in_loss_weights_become_tensors() -> None:
    weights = compose_settings(["loss.weight=[1,2,3,4,5,6,7,8,9,10]"])
    assert build_loss(weights.loss).weight.tolist() == list(range(1, 11))
    assert build_loss(compose_settings(["loss=bce", "loss.pos_weight=3"]).loss).pos_weight.tolist() == [3.0]


def test_lazy_layers_infer_their_shapes_from_the_data() -> None:
    assert build.build_session(compose_settings(["model=mlp"])).state.model.fc1.in_features == 3072


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+hooks.h._target_=buildmodule.UnknownMethod"], ["hooks.h", "on_epoch_start", "did you mean on_start?"]),
        (["+hooks.h._target_=buildmodule.NoMethods"], ["hooks.h", "add one of on_start"]),
        (["+param_groups.a={module: fc1, momentum: -3}"], ["param_groups.a", "Invalid momentum value"]),
        (["data=without_classes"], ["data.classes", "WithoutClasses does not give it", "data.classes=NUMBER"]),
        (
            ["watch=[fc2.wieght]", "+param_groups.a={module: fc9, lr: 1}"],
            ["did you mean fc2.weight?", "param_groups.a", "module: fc"],
        ),
        (["loss.reduction=none"], ["loss.reduction=none", "must be a single number"]),
        (["optim=lbfgs", "+param_groups.a={module: fc1, lr: 0.5}"], ["LBFGS", "one param group"]),
        (["data.train={_target_: builtins.object}"], ["data.train", "no __getitem__"]),
        (["model=object"], ["model", "not a torch.nn.Module"]),
        (["optim=dict"], ["optim", "Optimizer"]),
        (
            ["scheduler=plateau", "scheduler.interval=step"],
            ["write scheduler.interval=epoch"],
        ),
        ([*LINE, "monitor={metric: val/accuracy, mode: max}"], ["accuracy needs classes"]),
        (
            ["data.split=off", "monitor={metric: val/accuracy, mode: max}"],
            ["there is no validation set", "data.split=0.2"],
        ),
        (
            ["evaluation_step=off", "monitor={metric: val/accuracy, mode: max}"],
            ["there is no validation set", "remove evaluation_step=off"],
        ),
        (
            ["+param_groups.a={module: fc1, lr_mult: 3}", "scheduler=flat"],
            ["scheduler", "one learning rate", "lists"],
        ),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_settings_that_cannot_work_are_an_error_before_training(overrides: list[str], words: list[str]) -> None:
    with pytest.raises((ConfigError, UserCodeError)) as caught:
        build.build_session(compose_settings(overrides))
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_micro_batches_with_batch_statistics_give_a_note() -> None:
    settings = compose_settings(["model=norm", "micro_batch=8"])
    assert any("batch statistics" in line for line in startup_notes(build.build_session(settings)))


def test_unused_splits_and_frozen_batch_norms_give_a_note(here: Path) -> None:
    np.savez(here / "a.npz", X=np.ones((6, 3072)), y=np.arange(6) % 3, X_val=np.ones((2, 3072)), y_val=np.arange(2))
    overrides = ["data=arrays", "data.file=a.npz", "model=mlp", "data.split=0.5"]
    settings = compose_settings(overrides)
    assert any("nothing is split off" in line for line in startup_notes(build.build_session(settings), overrides))
    settings = compose_settings(["model=norm", "+param_groups.a={name: '1.*', freeze: true}"])
    lines = startup_notes(build.build_session(settings))
    assert any("frozen batch norm" in line for line in lines)
    assert any(line.split()[:4] == ["default", "2", "30,730", "SGD"] for line in lines)
    assert any(line.split()[:2] == ["(frozen)", "2"] for line in lines)


def test_classes_of_the_config_that_the_data_set_contradicts_give_a_note(here: Path) -> None:
    (here / "conf" / "experiment").mkdir()
    text = "# @package _global_\ndata: {train: {_target_: buildmodule.TwelveClasses}, split: 0.2}\n"
    (here / "conf" / "experiment" / "inherits.yaml").write_text(text)
    overrides = ["experiment=inherits", "data=digits"]  # the experiment inherits the 10 classes of digits
    lines = startup_notes(build.build_session(compose_settings(overrides)))
    assert any("data.classes is 10, and the data set has 12 classes" in line for line in lines), lines
    lines = startup_notes(build.build_session(compose_settings([*overrides, "data.classes=null"])))
    assert not any("classes" in line for line in lines), lines


def test_targets_beyond_the_outputs_of_the_model_give_a_hint() -> None:
    session = build.build_session(compose_settings(["model.num_classes=5"]))
    with pytest.raises(IndexError) as caught:
        fit(session.state, session.train)
    explained = explain_error(caught.value, session)
    assert explained.exit_code == 2
    assert "data.classes" in str(explained)


def test_the_optimizer_holds_the_parameters_on_the_device() -> None:
    session = build.build_session(compose_settings([]))
    held = {id(p) for group in session.state.objects.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in session.state.objects.model.parameters()}
    assert {p.device for p in session.state.objects.model.parameters()} == {torch.device(session.state.objects.device)}


class CountingSGD(torch.optim.SGD):
    """Counts the calls of its `zero_grad`."""

    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("target", ["torch.optim.AdamW", f"{__name__}.CountingSGD"])
def test_zero_grad_of_an_optimizer_does_what_torchs_does(target: str) -> None:
    optimizer = build.build_session(compose_settings(["model=mlp", f"optim._target_={target}"])).state.optimizer
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for set_to_none in (True, False):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.zero_grad(set_to_none=set_to_none)  # type: ignore[call-arg]
        assert all(param.grad is None if set_to_none else not param.grad.any() for param in params)
    assert getattr(optimizer, "calls", 2) == 2

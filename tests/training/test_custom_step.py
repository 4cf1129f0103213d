"""Custom training and evaluation steps: exact means, micro batches, several optimizers, and clear errors."""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Command
from tests.helpers import KILL_MODULE, read_history
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS

MODULE = (
    KILL_MODULE
    + '''
import os, signal
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    """Predicts a class with `head`, and has a second part `other`."""
    def __init__(self):
        super().__init__()
        self.head, self.dropout = nn.Linear(4, 3), nn.Dropout(0.3)
        self.other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.head(self.dropout(x))

class Plain(Net):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Identity()

class Pair(Plain):
    def forward(self, x):
        return super().forward(x), x

def of_pair(model, inputs, targets, loss_fn):
    return loss_fn(model(inputs)[0], targets)

class Points:
    classes = ["a", "b", "c"]

    def __init__(self, size=37):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % 3

def supervised(model, inputs, targets, loss_fn):
    return loss_fn(model(inputs), targets)

def named(model, inputs, targets, loss_fn, scale=0.5):
    outputs = model(inputs)
    classes = loss_fn(outputs, targets)
    kept = targets != 2                       # another denominator than the samples
    count = kept.sum()
    size = (outputs[kept] ** 2).sum() / (3 * count)
    weights = 1.0 + targets
    loss = (F.cross_entropy(outputs, targets, reduction="none") * weights).sum() / weights.sum()
    return {
        "loss": loss,
        "denominator": weights.sum(),
        "classes": (classes, len(targets)),
        "size": (size, count),
        "constant": 2.5,
        "outputs": outputs,
    }

def in_turn(model, inputs, targets, loss_fn):
    noise = torch.randn_like(inputs)
    yield "other", F.softplus(-model.other(inputs)).mean() + F.softplus(model.other(noise)).mean()
    outputs = model(inputs)
    yield "head", {"loss": loss_fn(outputs, targets) - 0.1 * model.other(inputs * outputs.mean()).mean(), "extra": 1.0}

class Queue:
    """A step with a state: the mean of the outputs so far."""
    def __init__(self):
        self.mean = torch.zeros(3)

    def __call__(self, model, inputs, targets, loss_fn, progress):
        outputs = model(inputs)
        self.mean = 0.9 * self.mean + 0.1 * outputs.detach().mean(0)
        return loss_fn(outputs - self.mean * (1 + 0.1 * progress.epoch), targets)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, saved):
        self.mean = saved["mean"]

def whole(model, inputs, targets, loss_fn):
    return {"loss": model(inputs).var(), "denominator": len(targets)}
whole.whole_batch = True

def mean_of_means(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs), targets) * len(inputs), "denominator": len(inputs)}

def constant_denominator(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs), targets), "denominator": 1}

def noisy(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs + torch.randn_like(inputs)), targets), "denominator": len(inputs)}

class Unsaved(Queue):
    def state_dict(self):
        return {"mean": self.mean, "draw": lambda: 3}

class Learned(nn.Module):
    """A step with a parameter, and a frozen part in a second object."""
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, model, inputs, targets, loss_fn):
        return loss_fn(model(inputs) * self.scale, targets)

class Guided:
    """A step with a module that is used without gradients, and the model's own parameters as an attribute."""
    def __init__(self, keep=False):
        self.guide, self.keep = nn.Linear(4, 3), keep

    def __call__(self, model, inputs, targets, loss_fn):
        self.model = model
        with torch.set_grad_enabled(self.keep):
            guide = self.guide(inputs)
        return loss_fn(model(inputs) + guide, targets)

def backward(model, inputs, targets, loss_fn):
    loss = loss_fn(model(inputs), targets)
    loss.backward()
    return loss

class GuidedWithGradient(Guided):
    def __init__(self):
        super().__init__(keep=True)

def coupled_later(model, inputs, targets, loss_fn, progress):
    outputs = model(inputs)
    loss = loss_fn(outputs, targets) + 100 * progress.step * outputs.var()
    return {"loss": loss, "denominator": len(inputs)}

class NeedsSize:
    def __init__(self, size):
        self.size = size

constant = 3

def without_loss(model, inputs, targets, loss_fn):
    return {"los": model(inputs).sum()}

def a_number(model, inputs, targets, loss_fn):
    return loss_fn(model(inputs), targets).item()

def a_vector(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs), targets), "size": inputs}

def taken(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs), targets), "samples": 3}

def in_turn_of_pair(model, inputs, targets, loss_fn):
    yield "head", loss_fn(model(inputs)[0], targets)

def empty(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs), targets), "denominator": 0}

def unknown_optimizer(model, inputs, targets, loss_fn):
    yield "heads", loss_fn(model(inputs), targets)

def wrong_optimizer(model, inputs, targets, loss_fn):
    yield "other", loss_fn(model(inputs), targets)

def no_pair(model, inputs, targets, loss_fn):
    yield loss_fn(model(inputs), targets)

def two_arguments(model, inputs):
    return model(inputs).sum()

def raises(model, inputs, targets, loss_fn):
    return model(inputs[:, :2]).sum()
'''
)
FILES = {
    "conf/model/net.yaml": "_target_: stepmodule.Net\n",
    "conf/model/plain.yaml": "_target_: stepmodule.Plain\n",
    "conf/model/pair.yaml": "_target_: stepmodule.Pair\n",
    "conf/data/points.yaml": "train: {_target_: stepmodule.Points}\nval: {_target_: stepmodule.Points, size: 20}\n",
    "conf/optim/two.yaml": "head: {_target_: torch.optim.Adam, lr: 0.01}\n"
    "other: {_target_: torch.optim.SGD, lr: 0.1}\n",
    "conf/param_groups/two.yaml": 'h: {name: "head.*", optimizer: head}\no: {name: "other.*", optimizer: other}\n',
}
BASE = ["data=points", "batch_size=8", "progress=plain", "epochs=3"]
ONE = ["optim=adam", "lr=0.01", *BASE]
TWO = ["optim=two", "param_groups=two", "training_step=stepmodule.in_turn", *BASE]
NAMED = ["training_step=stepmodule.named", "evaluation_step=${training_step}"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with steps, a model and data."""
    (tmp_path / "stepmodule.py").write_text(MODULE)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def without_clocks(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in epoch.items() if name not in CLOCKS} for epoch in history]


def train(command: Command, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train without an error; return the history."""
    done = command(*overrides, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return without_clocks(read_history(folder))


def final(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the hash of the final state, and the history."""
    return digest(Checkpoints(run / "checkpoints").newest()[1]), without_clocks(read_history(run))


def kill_and_resume(command: Command, own: Path, step: int, *overrides: str) -> None:
    """Check that a run that is killed after a step and resumed equals a run that is not killed."""
    train(command, own / "whole", *overrides, "checkpoint.every_steps=1")
    kill = ["+hooks.kill._target_=stepmodule.Kill", f"+hooks.kill.step={step}"]
    killed = command(*overrides, *kill, "checkpoint.every_steps=1", f"hydra.run.dir={own / 'killed'}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = command("resume", str(own / "killed"), "~hooks.kill")
    assert resumed.returncode == 0, resumed.stderr
    assert final(own / "killed") == final(own / "whole")


def import_module(own: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.delitem(sys.modules, "stepmodule", raising=False)
    return importlib.import_module("stepmodule")


# ------------------------------------------------------------------------------------- one update


def test_a_step_that_does_what_the_supervised_step_does_gives_the_same_numbers(own: Path, forked: Command) -> None:
    supervised = train(forked, own / "supervised", "model=net", *ONE)
    assert train(forked, own / "custom", "model=net", *ONE, "training_step=stepmodule.supervised") == supervised


@pytest.mark.parametrize("more", [(), ("micro_batch=3",), ("precision=bf16",)], ids=["whole", "micro batches", "bf16"])
def test_each_number_of_a_step_is_the_mean_over_its_own_denominator(
    own: Path, forked: Command, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    history = train(forked, own / "run", "model=plain", *ONE, *NAMED, "lr=0", "epochs=1", *more)
    module = import_module(own, monkeypatch)
    torch.manual_seed(0)
    data, weights = module.Points(), Checkpoints(own / "run" / "checkpoints").newest()[1]["model"]
    model = module.Plain()
    model.load_state_dict(weights)
    for part, points in (("train", data), ("val", module.Points(20))):
        targets = torch.tensor([points[i][1] for i in range(len(points))])
        expected = module.named(model.double(), points.x.double(), targets, nn.CrossEntropyLoss())
        tolerance = 1e-2 if "precision=bf16" in more else 1e-6
        for name in ("loss", "classes", "size", "constant"):
            value = expected[name][0] if isinstance(expected[name], tuple) else expected[name]
            number = torch.as_tensor(value).item()
            assert history[0][f"{part}/{name}"] == pytest.approx(number, rel=tolerance), (part, name)


def test_micro_batches_of_a_step_train_as_the_whole_batch_does(own: Path, forked: Command) -> None:
    whole = train(forked, own / "whole", "model=plain", *ONE, *NAMED)
    for size in (1, 3, 7):
        parts = train(forked, own / f"parts{size}", "model=plain", *ONE, *NAMED, f"micro_batch={size}")
        for one, other in zip(whole, parts, strict=True):
            assert other == pytest.approx(one, rel=1e-4)


def test_a_step_that_draws_random_numbers_is_split_with_a_note(own: Path, forked: Command) -> None:
    done = forked("model=net", *ONE, "training_step=stepmodule.noisy", "micro_batch=3", f"hydra.run.dir={own / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "it is unknown whether the losses of micro batches add up" in done.stdout + done.stderr


def test_a_step_gets_the_arguments_of_its_node(own: Path, forked: Command) -> None:
    node = "training_step={_target_:stepmodule.named,scale:2}"
    assert train(forked, own / "run", "model=plain", *ONE, node)[-1]["train/constant"] == 2.5


def test_metrics_take_the_outputs_of_a_step(own: Path, forked: Command) -> None:
    more = ["metrics=classification", "+metrics.accuracy.on=[train,val]"]
    supervised = train(forked, own / "supervised", "model=plain", *ONE, *more)
    custom = train(forked, own / "custom", "model=plain", *ONE, *more, *NAMED)
    assert supervised[0].keys() <= custom[0].keys()


def test_a_step_with_lbfgs_trains_as_the_supervised_step_does(own: Path, forked: Command) -> None:
    options = ["model=plain", "optim=lbfgs", *BASE, "batch_size=37", "optim.max_iter=5"]
    supervised = train(forked, own / "supervised", *options)
    assert train(forked, own / "custom", *options, "training_step=stepmodule.supervised") == supervised


# --------------------------------------------------------------------------- an update for each optimizer


def test_losses_in_turn_train_as_the_hand_written_loop_does(
    own: Path, forked: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = train(forked, own / "run", "model=plain", *TWO, "data.shuffle=off", "epochs=2", "checkpoint.keep=9")
    module = import_module(own, monkeypatch)
    checkpoints = Checkpoints(own / "run" / "checkpoints")
    start = checkpoints.load(checkpoints.names()[-1])
    model, loss_fn = module.Plain(), nn.CrossEntropyLoss()
    model.load_state_dict(start["model"])
    optimizers = {
        "head": torch.optim.Adam(model.head.parameters(), lr=0.01),
        "other": torch.optim.SGD(model.other.parameters(), lr=0.1),
    }
    torch.set_rng_state(start["rng"]["torch"])
    data = module.Points()
    for epoch in history:
        sums = {"head": 0.0, "other": 0.0}
        for first in range(0, len(data), 8):
            inputs = data.x[first : first + 8]
            targets = torch.arange(first, min(first + 8, len(data))) % 3
            for name, returned in module.in_turn(model, inputs, targets, loss_fn):
                loss = returned["loss"] if isinstance(returned, dict) else returned
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
                sums[name] += loss.item() * len(inputs)
        for name, total in sums.items():
            assert epoch[f"train/{name}"] == pytest.approx(total / len(data), rel=1e-6)
        assert epoch["train/loss"] == pytest.approx(sum(sums.values()) / len(data), rel=1e-6)
        assert epoch["train/extra"] == 1.0


@pytest.mark.parametrize("more", [("precision=bf16",), ("precision=fp16",), ("clip_norm=0.1",), ("ema=0.9",)])
def test_losses_in_turn_support_the_options_of_a_step(own: Path, forked: Command, more: tuple[str, ...]) -> None:
    history = train(forked, own / "run", "model=net", *TWO, *more)
    assert all(math.isfinite(row["train/loss"]) and row["grad_norm"] > 0 for row in history)


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_killed_step_with_named_losses_under_micro_batches_resumes_to_the_same_bits(
    own: Path, forked: Command, step: int
) -> None:
    kill_and_resume(forked, own, step, "model=net", *ONE, *NAMED, "micro_batch=3")


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_killed_step_with_several_optimizers_resumes_to_the_same_bits(own: Path, forked: Command, step: int) -> None:
    kill_and_resume(forked, own, step, "model=net", *TWO)


def test_a_killed_step_with_a_state_resumes_to_the_same_bits(own: Path, forked: Command) -> None:
    kill_and_resume(forked, own, 7, "model=net", *ONE, "training_step=stepmodule.Queue")


def test_a_resumed_run_does_not_compare_its_micro_batches_again(own: Path, forked: Command) -> None:
    # Here the comparison of a later step refuses what that of the first step accepts.
    kill_and_resume(forked, own, 4, "model=plain", *ONE, "training_step=stepmodule.coupled_later", "micro_batch=3")


def test_the_trial_of_the_validation_changes_no_state_of_a_step(own: Path, forked: Command) -> None:
    # The checkpoint after the first step is written before the trial, and a resumed run has no trial.
    step = ["training_step=stepmodule.Queue", "evaluation_step=${training_step}"]
    kill_and_resume(forked, own, 2, "model=net", *ONE, *step)


def test_a_denominator_of_0_is_a_note(own: Path, forked: Command) -> None:
    done = forked("model=net", *ONE, "training_step=stepmodule.empty", f"hydra.run.dir={own / 'run'}")
    assert "note: the denominator of the first batch is 0" in done.stderr


def test_modules_that_a_step_uses_without_gradients_are_no_error(own: Path, forked: Command) -> None:
    train(forked, own / "run", "model=net", *ONE, "training_step=stepmodule.Guided")


def test_a_state_that_a_checkpoint_cannot_hold_is_an_error(own: Path, forked: Command) -> None:
    done = forked("model=net", *ONE, "training_step=stepmodule.Unsaved", f"hydra.run.dir={own / 'run'}")
    assert done.returncode == 3, done.stderr
    assert "training_step.state_dict.draw: a function cannot be stored in a checkpoint" in done.stderr


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("step", "more", "words"),
    [
        ("without_loss", (), ["training_step: stepmodule.without_loss", "without 'loss'"]),
        ("a_number", (), ["training_step: stepmodule.a_number", "Python float", "remove .item()"]),
        ("a_vector", (), ["training_step: stepmodule.a_vector", "size is (8, 4)", "return its mean"]),
        ("taken", (), ["'samples'", "choose another name"]),
        ("two_arguments", (), ["is called with (model, inputs, targets, loss_fn)"]),
        ("raises", (), ["training_step: RuntimeError", "stepmodule.py"]),
        ("backward", (), ["training_step: stepmodule.backward", "calls backward", "return the loss alone"]),
        ("Learned", (), ["training_step: stepmodule.Learned", "its parameter scale", "into the model or the loss"]),
        ("GuidedWithGradient", (), ["its parameter guide.weight", "compute with torch.no_grad()"]),
        ("NeedsSize", (), ["stepmodule.NeedsSize needs size", "training_step='{_target_: stepmodule.NeedsSize, size"]),
        ("constant", (), ["stepmodule.constant is of type int", "cannot be called"]),
        ("unknown_optimizer", TWO, ["yields 'heads'", "did you mean head"]),
        ("wrong_optimizer", TWO, ["the loss of 'other' does not depend on a parameter of this optimizer"]),
        ("no_pair", TWO, ["yields a Tensor", "a pair (optimizer name, loss)"]),
        ("supervised", ("micro_batch=3",), ["micro_batch=3", "returns no denominator"]),
        ("whole", ("micro_batch=3",), ["micro_batch=3", "has whole_batch = True"]),
        ("mean_of_means", ("micro_batch=3",), ["micro_batch=3", "is not a mean over its denominator", "the loss of 3"]),
        ("constant_denominator", ("micro_batch=3",), ["micro_batch=3", "those of their parts add up to 2"]),
        ("in_turn", (*TWO, "micro_batch=3"), ["micro_batch=3", "updates the weights several times"]),
        ("in_turn", (*TWO, "on_nonfinite=skip"), ["on_nonfinite=skip", "rollback"]),
        ("in_turn", ("optim=lbfgs",), ["yields a loss for each optimizer", "LBFGS"]),
        ("supervised", ("evaluation_step=stepmodule.in_turn",), ["evaluation_step", "is a generator"]),
        ("supervised", ("monitor.metric=val/kl", "monitor.mode=min"), ["val/kl", "choose from"]),
        ("named", ("metrics=classification", "evaluation_step=stepmodule.supervised"), ["returns no 'outputs'"]),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_wrong_step_is_a_clear_error(forked: Command, step: str, more: Sequence[str], words: Sequence[str]) -> None:
    done = forked("model=plain", *BASE, *more, f"training_step=stepmodule.{step}")
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nothing", ["training_step=nothing", "choose from: supervised"]),
        ("stepmodule.nothing", ["training_step=stepmodule.nothing", "nothing"]),
        ("{scale: 1}", ["training_step", "_target_"]),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_step_that_does_not_exist_is_a_config_error(forked: Command, value: str, words: Sequence[str]) -> None:
    done = forked("model=plain", *BASE, f"training_step={value}")
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# ----------------------------------------------------------------------------------------- commands


@pytest.mark.usefixtures("own")
def test_inspect_shows_the_gradient_of_a_custom_step(forked: Command) -> None:
    rows = {}
    variants: dict[str, tuple[str, ...]] = {"supervised": (), "custom": ("training_step=stepmodule.supervised",)}
    for name, more in variants.items():
        done = forked("inspect", "--json", "model=net", *ONE, *more)
        assert done.returncode == 0, done.stderr
        rows[name] = json.loads(done.stdout)
    assert rows["custom"] == rows["supervised"]


@pytest.mark.usefixtures("own")
def test_commands_that_need_one_gradient_say_that_a_step_has_several(forked: Command) -> None:
    for command in ("inspect", "bench"):
        done = forked(command, "model=net", *TWO)
        assert done.returncode == 2, done.stderr
        assert "stepmodule.in_turn" in done.stderr


@pytest.mark.usefixtures("own")
def test_a_supervised_validation_beside_losses_in_turn_does_not_name_the_training_step(forked: Command) -> None:
    done = forked("model=pair", *TWO, "training_step=stepmodule.in_turn_of_pair")
    assert "write evaluation_step=PATH, a step that returns a loss, or off" in done.stderr


@pytest.mark.usefixtures("own")
def test_a_supervised_validation_that_fails_names_the_evaluation_step(forked: Command) -> None:
    done = forked("model=pair", *ONE, "training_step=stepmodule.of_pair")
    assert done.returncode == 1, done.stderr
    assert "write evaluation_step='${training_step}'" in done.stderr
    assert "epoch 1" not in done.stdout  # found after the first step

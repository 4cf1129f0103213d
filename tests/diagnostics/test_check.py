"""`trainkit check`: all errors at once, the path with one batch, and the estimates."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.config.repair import compose_and_repair
from trainkit.diagnostics.check.held import MANY, hold_part
from trainkit.diagnostics.check.run import Report, check
from trainkit.engine.train import train

PARTS = """
import torch
from torch import nn
from torch.utils.data import IterableDataset

class OnEpochFails:
    def on_epoch(self, state, metrics):
        metrics["x"] = undefined_name

class OnStartFails:
    def on_start(self, state):
        raise ValueError("the start fails")

class NoEvent:
    pass

class UpdateFails:
    def update(self, outputs, targets):
        raise RuntimeError("the update fails")
    def compute(self):
        return 0.0
    def reset(self):
        pass

class NoReset:
    def update(self, outputs, targets):
        pass
    def compute(self):
        return 0.0

class ValidationFails(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.LazyLinear(10))
    def forward(self, images):
        if not self.training and len(images) > 2:
            raise RuntimeError("the validation fails")
        return super().forward(images)

class Clone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("the backward pass fails")

class BackwardFails(ValidationFails):
    def forward(self, images):
        return Clone.apply(nn.Sequential.forward(self, images))

class ForwardFails(ValidationFails):
    def forward(self, images):
        return nn.Sequential.forward(self, images[:, :1] if self.training else images)

class Unsaved:
    def on_step(self, state):
        pass
    def state_dict(self):
        return {"lock": __import__("threading").Lock()}
    def load_state_dict(self, saved):
        pass

def unequal(samples):
    raise ValueError("the collate fails")

class Numbers(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.randn(4, generator=generator)
            yield x, x.sum()[None]
"""
STREAM = ["model=linear", "model.in_features=4", "loss=mse", "data.split=off", "data.train._target_=parts.Numbers"]


@pytest.fixture(autouse=True)
def parts(here: Path) -> None:
    (here / "parts.py").write_text(PARTS)


def check_of(*overrides: str, seconds: float = 0.0) -> Report:
    return check(compose_and_repair(overrides), seconds)


def causes(report: Report) -> str:
    return "\n".join(problem.cause for problem in report.problems)


PLANTED = {  # override -> what its error must say
    "epocs=4": "epocs",
    "batch_size=0": "batch_size=0: must be",
    "scheduler=cosin": "scheduler has no choice 'cosin'",
    "+loss.foo=1": "loss.foo: torch.nn.CrossEntropyLoss has no argument 'foo'",
    "+hooks.missing._target_=parts.Absent": "there is no 'Absent' in parts",
    "+hooks.silent._target_=parts.NoEvent": "hooks.silent: NoEvent has no method that the loop calls",
    "+metrics.m._target_=parts.NoReset": "metrics.m: parts.NoReset",
    "watch=[fc9.weight]": "watch: the model has no parameter 'fc9.weight'",
    "+param_groups.q={name: fc9, lr: 1}": "param_groups.q: no parameter matches",
    "data.train._target_=trainkit.data.arrays": "",
    "+data.train.file=missing.npz": "missing.npz",
}


def test_at_least_eight_errors_of_different_kinds_are_listed_at_once(here: Path) -> None:
    report = check_of(*PLANTED)
    found = causes(report)
    for words in filter(None, PLANTED.values()):
        assert words in found, found
    assert len(report.problems) == len([words for words in PLANTED.values() if words])
    error = report.error()
    assert error is not None
    assert error.exit_code == 2
    assert not (here / "outputs").exists()


def test_a_config_without_errors_has_no_errors() -> None:
    report = check_of("limit_batches=2")
    assert report.error() is None
    assert report.problems == []
    assert set(report.phases.values()) == {"ok"}


def test_the_errors_of_a_metric_two_hooks_and_the_validation_are_all_reported() -> None:
    report = check_of(
        "model=parts.ValidationFails",
        "+hooks.a._target_=parts.OnEpochFails",
        "+hooks.b._target_=parts.OnStartFails",
        "+metrics.m._target_=parts.UpdateFails",
    )
    phases = report.phases
    assert [name for name, status in phases.items() if status != "ok"] == ["validation", "hooks"]
    assert "metrics.m: RuntimeError: the update fails" in phases["validation"]
    assert "model: RuntimeError: the validation fails" in phases["validation"]
    assert "hooks.a: NameError" in phases["hooks"]
    assert "hooks.b: ValueError: the start fails" in phases["hooks"]
    assert len(report.problems) == 4


@pytest.mark.parametrize(
    ("overrides", "phase", "words"),
    [
        (["model=parts.ForwardFails"], "forward", "mat1 and mat2"),
        (["model=parts.BackwardFails"], "backward", "the backward pass fails"),
        (["experiment=line_fit", "model.init=nan"], "step", "the loss is nan"),
        (["+hooks.a._target_=parts.Unsaved"], "checkpoint", "hooks.a"),
    ],
)
def test_an_error_is_reported_in_its_phase_and_earlier_phases_are_ok(
    overrides: list[str], phase: str, words: str
) -> None:
    report = check_of(*overrides)
    assert report.phases[phase].startswith("error")
    assert words in causes(report)
    names = list(report.phases)
    earlier = {report.phases[name] for name in names[: names.index(phase)]}
    assert earlier <= {"ok", "off"}


def test_a_collate_fault_and_a_wrong_rule_are_reported_together() -> None:
    report = check_of("data.collate=parts.unequal", "+param_groups.q={name: fc9, lr: 1}")
    assert "data.collate: ValueError: the collate fails" in causes(report)
    assert "param_groups.q" in causes(report)


def test_nothing_is_written_and_the_latest_link_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = here / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (here / "outputs").mkdir()
    (here / "outputs/latest").symlink_to("elsewhere")
    before = sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts)
    assert check_of("limit_batches=2", "logger=csv").error() is None
    assert sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts) == before
    assert (here / "outputs/latest").readlink() == Path("elsewhere")


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        ([*STREAM, "steps_per_epoch=5", "steps=12"], 3),
        ([*STREAM, "steps_per_epoch=5", "epochs=off", "max_minutes=0.5"], None),
        (["experiment=lbfgs_line"], 3),
        (["experiment=table_regression", "epochs=2"], 2),
        (["scheduler=onecycle", "epochs=1", "checkpoint=off", "limit_batches=3"], 1),
        (["steps=7", "steps_per_epoch=3", "checkpoint.every_steps=2", "limit_val_batches=1"], 3),
    ],
    ids=["stream", "max_minutes", "lbfgs", "table", "onecycle", "steps"],
)
def test_each_kind_of_training_is_estimated(overrides: list[str], epochs: int | None) -> None:
    report = check_of(*overrides, seconds=0.1)
    assert report.error() is None, causes(report)
    assert report.estimates is not None
    assert report.estimates.epochs == epochs
    assert report.estimates.run is not None
    assert report.estimates.run > report.estimates.startup > 0


@pytest.mark.slow
def test_a_gan_is_checked() -> None:
    report = check_of("experiment=dcgan", "limit_batches=2", seconds=0.1)
    assert report.error() is None, causes(report)


def test_the_size_of_a_checkpoint_is_that_of_the_run(here: Path) -> None:
    overrides = ["epochs=2", "limit_batches=2", "optim=adam", "progress=off", "report=off"]
    report = check_of(*overrides, seconds=0.1)
    assert report.estimates is not None
    run = train(compose_settings(overrides).source, directory=here / "run")
    folders = [folder for folder in (run.directory / "checkpoints").iterdir() if folder.is_dir()]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert report.estimates.checkpoint == pytest.approx(max(sizes), rel=0.02)


def test_the_estimate_counts_the_samples_that_the_run_holds_and_the_check_does_not(here: Path) -> None:
    (here / "images.py").write_text(
        "import torch\nclass Images:\n"
        "    def __len__(self):\n        return 3000\n"
        "    def __getitem__(self, i):\n"
        "        return torch.full((3, 8, 8), i % 200, dtype=torch.uint8), i % 10\n"
    )
    overrides = ["data.train._target_=images.Images", "data.split=off", "data.classes=10"]
    session = build_session(compose_settings(overrides))
    held = hold_part(session, session.train, "train")
    assert held is not None
    bytes_of_a_sample = 3 * 8 * 8 + 8  # uint8 and int64
    assert held[1].extra_bytes == (3000 - MANY) * bytes_of_a_sample
    assert held[1].read_seconds > 0
    streamed = build_session(compose_settings([*overrides, "data.cache=none"]))
    assert hold_part(streamed, streamed.train, "train") is None


@pytest.mark.parametrize("json_flag", [True, False])
def test_the_command_prints_phases_and_errors_with_the_exit_code_of_the_first_error(
    forked: Command, json_flag: bool
) -> None:
    argv = ["check", "+hooks.a._target_=parts.OnEpochFails", "limit_batches=1", "--seconds", "0"]
    done = forked(*argv, *(["--json"] if json_flag else []))
    assert done.returncode == 1
    assert "error: hooks.a: NameError" in done.stderr
    if json_flag:
        content: dict[str, Any] = json.loads(done.stdout)
        assert content["ok"] is False
        assert content["phases"]["forward"] == "ok"
        assert content["errors"][0]["cause"].startswith("hooks.a: NameError")
    else:
        assert "forward     ok" in done.stdout
        assert "1 error found" in done.stdout


def test_a_sweep_is_checked_by_its_first_job(forked: Command) -> None:
    argv = ["check", "-m", "optim=sgd,adam", "seed=0,1", "limit_batches=1", "--seconds", "0.1", "--json"]
    done = forked(*argv)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["jobs"]["number"] == 4
    assert content["jobs"]["overrides"][:2] == ["optim=sgd", "seed=0"]
    assert math.isfinite(content["estimates"]["run"])
    wrong = forked("check", "-m", "optim=sgd,adamm", "batch_size=0,1")
    assert wrong.returncode == 2
    assert "did you mean optim=adam?" in wrong.stderr
    assert "batch_size=0" in wrong.stderr

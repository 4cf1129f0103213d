"""A dotted path as a choice: `optim=torch.optim.AdamW` is that `_target_` without the arguments of another choice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import Command
from tests.helpers import read_history
from trainkit import compose
from trainkit.config.compose import compose_run, compose_sweep
from trainkit.config.static_targets import find_missing_target
from trainkit.core.errors import ConfigError

MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.body(x)
"""
QUICK = ("epochs=1", "limit_batches=2")


def plain(overrides: list[str], key: str) -> object:
    """Return the part of a composed config at a key."""
    return OmegaConf.to_container(OmegaConf.select(compose(overrides), key))


@pytest.mark.parametrize(
    ("group", "path"),
    [
        ("model", "torchvision.models.resnet18"),
        ("loss", "torch.nn.HuberLoss"),
        ("scheduler", "torch.optim.lr_scheduler.StepLR"),
        ("optim", "torch.optim.AdamW"),
    ],
)
def test_a_dotted_path_is_a_choice_without_the_arguments_of_another_choice(group: str, path: str) -> None:
    assert plain([f"{group}={path}"], group) == {"_target_": path}


def test_arguments_of_a_dotted_choice_need_no_plus_sign() -> None:
    overrides = ["model=trainkit.models.MLP", "model.hidden=[8]", "model.out_features=10"]
    assert plain(overrides, "model") == {"_target_": "trainkit.models.MLP", "hidden": [8], "out_features": 10}


def test_an_experiment_may_choose_a_dotted_path(here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: torchvision.models.resnet18\n"
        "  - override /optim: torch.optim.AdamW\nlr: 0.5\nmodel: {num_classes: 10}\n"
    )
    assert plain(["experiment=mine"], "model") == {"_target_": "torchvision.models.resnet18", "num_classes": 10}
    assert compose(["experiment=mine"]).optim.lr == 0.5


def test_a_config_file_with_the_name_of_a_dotted_path_comes_first(here: Path) -> None:
    (here / "conf" / "model").mkdir(parents=True)
    (here / "conf" / "model" / "mine.small.yaml").write_text("_target_: trainkit.models.MLP\nhidden: [2]\n")
    assert plain(["model=mine.small"], "model") == {"_target_": "trainkit.models.MLP", "hidden": [2]}


def test_lr_on_the_command_line_is_the_learning_rate_of_a_dotted_optimizer() -> None:
    composed = compose_run(["optim=torch.optim.AdamW", "lr=0.5"])
    assert composed.settings.optim == {"": {"_target_": "torch.optim.AdamW", "lr": 0.5}}
    assert composed.notes == ()


def test_a_dotted_scheduler_steps_every_epoch_unless_its_interval_is_given() -> None:
    overrides = ["scheduler=torch.optim.lr_scheduler.ConstantLR", "scheduler.total_iters='${total_steps:}'", "epochs=7"]
    settings = compose_run(overrides).settings.with_data(classes=10, steps_per_epoch=5)
    assert settings.scheduler[""]["total_iters"] == 7
    settings = compose_run([*overrides, "scheduler.interval=step"]).settings.with_data(classes=10, steps_per_epoch=5)
    assert settings.scheduler[""]["total_iters"] == 35


def test_without_lr_a_dotted_optimizer_uses_its_own_default_and_a_note_says_so() -> None:
    composed = compose_run(["optim=torch.optim.AdamW"])
    assert composed.settings.lr is None
    assert composed.notes == ("note: lr is not given, so torch.optim.AdamW uses its own default learning rate",)
    own = compose_run(["optim=torch.optim.AdamW", "optim.lr=0.5"])
    assert (own.settings.lr, own.settings.optim[""]["lr"], own.notes) == (None, 0.5, ())


def test_a_scheduler_that_needs_lr_is_an_error_if_a_dotted_optimizer_has_no_lr() -> None:
    with pytest.raises(ConfigError, match=r"scheduler.max_lr: it refers to lr, which is off\n  for example lr=0.01"):
        compose(["optim=torch.optim.AdamW", "scheduler=onecycle"])


def test_a_module_of_a_folder_that_is_not_on_the_path_is_not_its_own_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_a_script.py").write_text("class Net: ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".", str(tmp_path))])
    problem = find_missing_target("nets_of_a_script.Net")
    assert problem is not None
    assert problem.cause == "there is no module 'nets_of_a_script'"
    assert problem.hint.endswith(f"is not on sys.path: sys.path.append({str(tmp_path)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_missing_target("nets_of_a_script.Net") is None


@pytest.mark.parametrize(
    ("override", "cause", "hint"),
    [
        ("model=torchvision.models.resnet1", "there is no 'resnet1'", "did you mean torchvision.models.resnet18?"),
        ("optim=trch.optim.SGD", "there is no module 'trch'", "did you mean torch.optim.SGD?"),
        ("data=mydata.Birds", "data has no choice 'mydata.Birds'", "write data.train._target_=mydata.Birds"),
        ("optim=sgd.yml", "optim has no choice 'sgd.yml'", "did you mean optim=sgd?"),
    ],
)
def test_a_wrong_dotted_choice_is_reported_with_a_hint(override: str, cause: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    (problem,) = caught.value.problems
    assert cause in problem.cause
    assert hint in str(problem.hint)


def test_a_dotted_data_set_in_an_experiment_is_reported_with_a_hint(here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /data: mydata.Birds]\n"
    )
    with pytest.raises(ConfigError, match=r"write data: \{train: \{_target_: mydata.Birds\}\} in the experiment"):
        compose(["experiment=mine"])


def test_a_dotted_choice_is_checked_together_with_other_mistakes() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["optim=trch.optim.SGD", "epoch=3", "model=trainkit.models.MLP", "model.hidden=[2]"])
    assert len(caught.value.problems) == 2


def test_a_sweep_composes_dotted_choices() -> None:
    sweep = compose_sweep(
        ["optim=sgd,torch.optim.AdamW", "lr=0.1,0.2", "model=trainkit.models.MLP", "model.hidden=[2]"]
    )
    assert [job.settings.optim[""]["lr"] for job in sweep.jobs] == [0.1, 0.2, 0.1, 0.2]
    assert [len(job.settings.optim[""]) for job in sweep.jobs] == [6, 6, 2, 2]


def test_cfg_shows_a_dotted_choice(forked: Command) -> None:
    done = forked("optim=torch.optim.AdamW", "optim.eps=1e-3", "--cfg", "job", "--package", "optim")
    assert (done.returncode, done.stdout) == (0, "_target_: torch.optim.AdamW\neps: 0.001\n"), done.stderr
    assert "note: lr is not given" in done.stderr


def test_dotted_choices_train_from_the_command_line(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    scheduler = ("scheduler=torch.optim.lr_scheduler.StepLR", "scheduler.step_size=1", "scheduler.gamma=0.5")
    choices = ("model=mymodels.Net", "model.width=5", "loss=torch.nn.CrossEntropyLoss", "optim=torch.optim.AdamW")
    done = forked(*choices, *scheduler, "epochs=2", "limit_batches=2")
    assert done.returncode == 0, done.stderr
    assert "note: lr is not given, so torch.optim.AdamW uses its own default learning rate" in done.stderr
    assert [line["lr/default"] for line in read_history(tmp_path / "outputs" / "latest")] == [0.001, 0.0005]


def test_a_sweep_trains_dotted_choices(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    done = forked("-m", "optim=sgd,torch.optim.AdamW", "lr=0.5", "model=mymodels.Net", "model.width=5", *QUICK)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "outputs" / "sweeps").glob("*/*/*/history.jsonl"))
    assert [read_history(run.parent)[0]["lr/default"] for run in runs] == [0.5, 0.5]


def test_a_run_with_a_dotted_choice_can_be_resumed(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    assert forked("model=mymodels.Net", "optim=torch.optim.AdamW", *QUICK).returncode == 0
    done = forked("resume", "last", "epochs=2")
    assert done.returncode == 0, done.stderr
    assert len(read_history(tmp_path / "outputs" / "latest")) == 2

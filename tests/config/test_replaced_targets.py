"""A `KEY._target_=X` on the command line replaces a node: the arguments of the node before do not apply."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import Command
from tests.helpers import read_history
from trainkit import compose
from trainkit.config.compose import compose_run, compose_sweep
from trainkit.core.errors import ConfigError

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.body(x)

class Three(torch.utils.data.TensorDataset):
    def __init__(self, size=30):
        super().__init__(torch.zeros(size, 3, 32, 32), torch.arange(size) % 3)
"""
QUICK = ("epochs=1", "limit_batches=2")
NOTE = "note: optim._target_ replaces optim=sgd; its lr, momentum, dampening, weight_decay, nesterov do not apply"
LR_NOTE = "note: lr is not given, so torch.optim.AdamW uses its own default learning rate"


def plain(overrides: list[str], key: str) -> object:
    """Return the part of a composed config at a key, with its interpolations as they are written."""
    return OmegaConf.to_container(OmegaConf.select(compose(overrides), key))


def test_a_new_optimizer_drops_the_arguments_and_the_learning_rate_of_the_old_one() -> None:
    composed = compose_run(["optim._target_=torch.optim.AdamW"])
    assert composed.settings.optim == {"": {"_target_": "torch.optim.AdamW"}}
    assert composed.settings.lr is None
    assert composed.notes == (NOTE, LR_NOTE)


def test_lr_on_the_command_line_is_the_learning_rate_of_the_new_optimizer() -> None:
    composed = compose_run(["optim._target_=torch.optim.AdamW", "lr=0.5"])
    assert composed.settings.optim == {"": {"_target_": "torch.optim.AdamW", "lr": 0.5}}
    assert composed.settings.lr == 0.5
    assert composed.notes == (NOTE.replace("lr, ", ""),)
    own = compose_run(["optim._target_=torch.optim.AdamW", "optim.lr=0.5"])
    assert (own.settings.lr, own.settings.optim[""]["lr"]) == (None, 0.5)


def test_arguments_on_the_command_line_stay_and_new_arguments_need_no_plus_sign() -> None:
    overrides = ["optim._target_=torch.optim.AdamW", "optim.weight_decay=0.1", "optim.eps=0.2", "+optim.amsgrad=true"]
    expected = {"_target_": "torch.optim.AdamW", "weight_decay": 0.1, "eps": 0.2, "amsgrad": True}
    assert plain(overrides, "optim") == expected
    assert plain([*overrides[1:], overrides[0]], "optim") == expected  # in any order
    assert plain(["optim={_target_: torch.optim.AdamW, eps: 0.2}"], "optim") == {
        "_target_": "torch.optim.AdamW",
        "eps": 0.2,
    }


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("model._target_=trainkit.models.Polynomial", "model", {}),
        ("model=cnn_gru model._target_=trainkit.models.Polynomial", "model", {}),
        ("loss._target_=torch.nn.HuberLoss", "loss", {}),
        ("scheduler=step scheduler._target_=torch.optim.lr_scheduler.ConstantLR", "scheduler", {}),
        ("scheduler._target_=torch.optim.lr_scheduler.ConstantLR scheduler.factor=0.1", "scheduler", {"factor": 0.1}),
        ("data=synthetic data.train._target_=trainkit.data.digits", "data.train", {}),
        ("experiment=line_fit model._target_=trainkit.models.Polynomial model.x=3", "model", {"x": 3}),
        ("model=cnn_gru model.gru._target_=torch.nn.Linear model.gru.in_features=3", "model.gru", {"in_features": 3}),
        ("optim=muon_sgd optim.sgd._target_=torch.optim.AdamW", "optim.sgd", {}),
    ],
)
def test_a_new_target_of_any_node_drops_the_arguments_of_the_old_target(
    override: str, key: str, expected: dict[str, object]
) -> None:
    target = override.partition("_target_=")[2].partition(" ")[0]
    assert plain(override.split(), key) == {"_target_": target, **expected}


def test_the_hook_of_an_experiment_can_be_replaced(here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhooks: {h: {_target_: collections.Counter, a: 1, b: 2}}\n"
    )
    composed = compose_run(
        ["experiment=mine", "hooks.h._target_=collections.OrderedDict", "hooks.h.b=5", "hooks.h.c=6"]
    )
    assert composed.settings.hooks == {"h": {"_target_": "collections.OrderedDict", "b": 5, "c": 6}}
    assert composed.notes == ("note: hooks.h._target_ replaces collections.Counter; its a does not apply",)


def test_the_order_of_named_modules_stays() -> None:
    settings = compose_run(["model=cnn_gru", "model.cnn._target_=torch.nn.Flatten", "model.gru.in_features=3"]).settings
    assert list(settings.model) == ["cnn", "gru"]
    assert settings.model["cnn"] == {"_target_": "torch.nn.Flatten"}


def test_a_new_optimizer_among_several_keeps_the_learning_rate_of_the_other_optimizers() -> None:
    composed = compose_run(["optim=muon_sgd", "optim.sgd._target_=torch.optim.AdamW"])
    assert (composed.settings.lr, composed.settings.optim["muon"]["lr"]) == (0.01, 0.01)
    assert LR_NOTE in composed.notes
    given = compose_run(["optim=muon_sgd", "optim.sgd._target_=torch.optim.AdamW", "lr=0.5"])
    assert given.settings.optim["sgd"] == {"_target_": "torch.optim.AdamW", "lr": 0.5}


def test_a_new_training_set_drops_the_number_of_classes_and_the_keys_that_only_the_old_set_used() -> None:
    composed = compose_run(["data=cifar10", "data.val=null", "data.train._target_=trainkit.data.digits"])
    assert composed.settings.data.classes is None
    assert "root" not in composed.settings.source.data
    (note,) = composed.notes
    assert note == (
        "note: data.train._target_ replaces torchvision.datasets.CIFAR10; "
        "its root, train, download, data.classes, data.root do not apply"
    )
    given = compose_run(["data.train._target_=trainkit.data.synthetic", "data.classes=3"])
    assert given.settings.data.classes == 3


def test_a_validation_set_of_the_old_data_stays_and_a_note_says_so() -> None:
    composed = compose_run(["data=cifar10", "data.train._target_=trainkit.data.digits"])
    assert composed.notes[1] == "note: data.val is still torchvision.datasets.CIFAR10; data.val=null removes it"


def test_the_same_target_drops_nothing_and_prints_no_note() -> None:
    composed = compose_run(["optim._target_=torch.optim.SGD", "optim.momentum=0.5"])
    assert composed.settings.source == compose(["optim.momentum=0.5"])
    assert composed.notes == ()


def test_a_target_in_a_file_drops_nothing(here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\noptim: {_target_: torch.optim.RMSprop, dampening: 3}\n"
    )
    composed = compose_run(["experiment=mine"])
    assert composed.settings.optim[""]["dampening"] == 3
    assert composed.notes == ()


def test_a_misspelt_node_is_reported_and_not_added() -> None:
    with pytest.raises(ConfigError, match=r"did you mean model.cnn\._target_\?|did you mean model.cnn\?"):
        compose(["model=cnn_gru", "model.cn._target_=torch.nn.Flatten"])


def test_a_new_target_is_reported_together_with_other_mistakes() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["optim._target_=torch.optim.AdamW", "epoch=3", "lr=-1"])
    assert len(caught.value.problems) == 2


def test_the_rules_for_a_replaced_optimizer_are_dropped() -> None:
    composed = compose_run(["optim=muon_sgd", "optim._target_=torch.optim.AdamW"])
    assert composed.settings.param_groups == {}
    assert composed.notes[0] == (
        "note: optim._target_ replaces optim=muon_sgd; its lr, muon, sgd, param_groups.matrices do not apply"
    )


def test_a_message_shows_the_override_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"error: model.width=1,2: several values"):
        compose(["model._target_=trainkit.models.MLP", "model.width=1,2"])


def test_cfg_all_shows_the_config_that_is_trained(forked: Command) -> None:
    done = forked("optim._target_=torch.optim.AdamW", "optim.eps=0.5", "--cfg", "all")
    assert done.returncode == 0, done.stderr
    assert "optim:\n  _target_: torch.optim.AdamW\n  eps: 0.5\n" in done.stdout
    assert "hydra:\n" in done.stdout


def test_a_sweep_over_targets_drops_the_arguments_in_each_job() -> None:
    sweep = compose_sweep(["optim._target_=torch.optim.SGD,torch.optim.AdamW", "optim.weight_decay=0.1", "lr=0.5"])
    assert [sorted(job.settings.optim[""]) for job in sweep.jobs] == [
        ["_target_", "dampening", "lr", "momentum", "nesterov", "weight_decay"],
        ["_target_", "lr", "weight_decay"],
    ]


def test_a_new_target_trains_and_prints_one_note(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    done = forked("model._target_=mymodels.Net", "model.width=5", "optim._target_=torch.optim.AdamW", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(NOTE) == 1
    replaced = "note: model._target_ replaces model=toy_cnn; its in_channels, num_classes do not apply"
    assert done.stderr.count(replaced) == 1
    assert [line["lr/default"] for line in read_history(tmp_path / "outputs" / "latest")] == [0.001]


def test_a_new_training_set_trains_with_its_own_classes(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    done = forked("data.train._target_=mymodels.Three", "data.train.size=40", *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "latest" / "run.json").read_text())["classes"] == 3


def test_the_jobs_of_a_sweep_train_the_new_target(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "more" / "optim").mkdir(parents=True)
    text = "# @package _global_\nlr: 0.1\noptim: {_target_: torch.optim.SGD, lr: '${lr}', nesterov: false}\n"
    (tmp_path / "more" / "optim" / "mine.yaml").write_text(text)
    target = "optim._target_=torch.optim.SGD,torch.optim.AdamW"
    own = ("-cd", "more", "optim=mine", "model._target_=mymodels.Net", "model.width=5")
    done = forked("-m", *own, target, "optim.weight_decay=0.1", *QUICK)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "outputs" / "sweeps").glob("*/*/*/history.jsonl"))
    assert [read_history(run.parent)[0]["lr/default"] for run in runs] == [0.1, 0.001]
    assert "+" not in "".join(done.stdout.splitlines()[1:])  # the table shows the overrides as they were written


@pytest.mark.parametrize("command", ["params", "inspect"])
def test_commands_for_one_config_replace_targets_and_keep_stdout_clean(
    command: str, forked: Command, tmp_path: Path
) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    done = forked(command, "--json", "model._target_=mymodels.Net", "model.width=5", "optim._target_=torch.optim.AdamW")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert done.stderr.count(NOTE) == 1

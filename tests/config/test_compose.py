"""Composition and checks: all problems of a config are reported together, each with a hint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainkit import compose
from trainkit.config.compose import compose_run, compose_sweep
from trainkit.config.jobs import libraries_of
from trainkit.config.search_path import ignored_configs
from trainkit.core.errors import ConfigError

SEP = re.compile(r"\n(?=error: )")


def problems_of(*overrides: str) -> list[str]:
    """Return the problems of a command, each in two lines."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return SEP.split(str(caught.value))


def test_the_headline_command_composes() -> None:
    config = compose(["model=toy_cnn", "optim=sgd", "lr=0.01"])
    assert config.optim.lr == config.lr == 0.01
    assert config.model.num_classes == config.data.classes == 10


def test_each_optimizer_has_a_default_learning_rate_that_lr_overrides() -> None:
    assert [compose([f"optim={name}"]).lr for name in ("sgd", "adam", "adadelta")] == [0.01, 0.001, 1.0]
    assert compose(["optim=adadelta", "lr=0.5"]).optim.lr == 0.5


@pytest.mark.parametrize("off", ["off", "false", "null"])
def test_off_false_and_null_switch_a_key_off(off: str) -> None:
    config = compose([f"micro_batch={off}", f"early_stop={off}", f"data.split={off}", f"clip_norm={off}"])
    assert config.micro_batch is config.early_stop is config.data.split is config.clip_norm is None


MISTAKES = [
    ("epoch=3", "epoch", "did you mean epochs?"),
    ("data.on_error=skip", "data.on_error is now", "write data.on_unreadable=skip"),
    ("+data.augment.crop=4", "data.augment.crop is now", "write data.augment.crop_padding=4"),
    ("data.cache_limit=off", "auto or a number above 0", "write data.cache_limit=auto, which was off before"),
    ("bach_size=3", "bach_size", "did you mean batch_size?"),
    ("momentum=0.9", "momentum", "did you mean optim.momentum?"),
    ("optim.momentun=0.9", "optim.momentun", "did you mean optim.momentum?"),
    ("data.splt=0.5", "data.splt", "did you mean data.split?"),
    ("modle=toy_cnn", "modle", "did you mean model?"),
    ("model=toy_cn", "toy_cn", "did you mean model=toy_cnn?"),
    ("optim=SGD", "SGD", "did you mean optim=sgd?"),
    ("loss=crossentropy", "crossentropy", "did you mean loss=cross_entropy?"),
    ("data=cifar", "cifar", "did you mean data=cifar10"),
    ("experiment=linefit", "linefit", "did you mean experiment=line_fit?"),
    ("scheduler=cosin", "cosin", "did you mean scheduler=cosine?"),
    ("lr=-1", "lr=-1", "at least 0"),
    ("epochs=ten", "epochs=ten", "whole number of at least 1"),
    ("epochs=2.5", "epochs=2.5", "the default is epochs=20"),
    ("batch_size=0", "batch_size=0", "at least 1"),
    ("data.split=1.5", "data.split=1.5", "below 1"),
    ("device=gpu", "device=gpu", "auto, cpu, cuda"),
    ("monitor.metric=val/acc", "val/acc", "did you mean monitor.metric=val/accuracy?"),
    ("monitor.metric=val/miou monitor.mode=max", "does not compute val/miou", "a custom step can add metrics"),
    ("monitor.metric=3", "monitor.metric=3", "must be a word"),
    ("monitor.metric=train/loss_sum monitor.mode=max", "is best at its min", "write monitor.mode=min"),
    ("monitor.mode=mx", "mx", "did you mean monitor.mode=max?"),
    ("progress=rcih", "rcih", "did you mean progress=rich?"),
    ("watch=weight", "watch=weight", "write watch=[weight]"),
    ("early_stop.patience=-3", "early_stop.patience=-3", "at least 1"),
    ("model._target_=trainkit.models.ToyCNNN", "ToyCNNN", "did you mean trainkit.models.ToyCNN?"),
    ("model._target_=trainkitt.models.ToyCNN", "trainkitt", "did you mean trainkit.models.ToyCNN?"),
    ("optim._target_=torch.optim.SDG", "SDG", "did you mean torch.optim.SGD?"),
    ("optim._target_=trch.optim.SGD", "trch", "did you mean torch.optim.SGD?"),
    ("model._target_=Net", "Net", "dotted path"),
    ("data.pin_memory=on", "the key 'data.pin_memory' does not exist", "the keys of data are: train, val, split,"),
    ("data.collate_fn=mine.collate", "the key 'data.collate_fn' does not exist", "the keys of data are: train,"),
    ("monitor.smoothing=3", "the key 'monitor.smoothing' does not exist", "the keys of monitor are: metric, mode"),
    ("data.augment.rotate=3", "the key 'data.augment.rotate' does not exist", "the keys of data.augment are: flip,"),
    ("early_stop.pateince=3", "early_stop.pateince", "did you mean early_stop.patience?"),
    ("+data.aument=1", "data.aument", "nothing refers to it"),
    ("+epoch=3", "epoch", "did you mean epochs?"),
    ("lr", "lr", "KEY=VALUE"),
    ("optim=sgd,adam", "several values", "-m"),
    ("~optimm", "optimm", "did you mean optim?"),
    ("data=arrays", "data.file", "it must be given"),
    ("monitor.metric=val/accuracy monitor.mode=min", "is best at its max", "write monitor.mode=max"),
    ("data=line", "cross entropy", "loss=mse"),
    ("+model=mlp", "model", "write model=mlp"),
    ("model@x=mlp", "model", "write model=mlp"),
    ("model=null", "model", "toy_cnn"),
    ("scheduler=null", "scheduler", "write scheduler=none"),
    ("optim.lr=0.5", "optim.lr=0.5", "write lr=0.5"),
    ("lr=inf", "lr=inf", "at least 0"),
    (f"lr=1{'0' * 400}", "lr=1000", "at least 0"),
    ("lr=off", "the optimizer needs a value", "for example lr=0.01"),
    ("lr=${oc.env:NO_SUCH_THING} optim.lr=1", "NO_SUCH_THING", "${oc.env:NO_SUCH_THING,VALUE}"),
    ("monitor=val/loss", "monitor=val/loss", "write monitor.metric=val/loss"),
    ("early_stop=3", "early_stop=3", "write early_stop.patience=3"),
    ("+hooks.a=1", "hooks.a", "add +hooks.a._target_"),
    ("data.normalize.mean=0.5", "data.normalize.mean", "data.normalize"),
    ("loss._target_=torch.nn.CrossEntropyLos", "CrossEntropyLos", "did you mean torch.nn.CrossEntropyLoss?"),
    ("loss.reduction=none", "loss.reduction=none", "write loss.reduction=mean"),
    ("hydra.run.dir=", "hydra.run.dir", "write hydra.run.dir=DIR"),
    ("hydra.run.dir=${nope}", "hydra.run.dir", "write hydra.run.dir=DIR"),
    (
        "checkpoint=off checkpoint.weights=trainable",
        "checkpoint is off",
        "remove checkpoint=off, or checkpoint.weights",
    ),
    ("early_stop=off early_stop.patience=3", "early_stop is off", "remove early_stop=off, or early_stop.patience=3"),
    (
        "training_step=trainkit.steps.vae training_step.beta=3",
        "is trainkit.steps.vae",
        "_target_: trainkit.steps.vae, beta: 3",
    ),
    ("training_step._target_=my.Step", "training_step is supervised", "write training_step='{_target_: my.Step}'"),
    ("training_step.t=3", "training_step is supervised", "write training_step='{_target_: PATH, t: 3}'"),
    ("scheduler=step scheduler.interval=epochs", "interval", "did you mean scheduler.interval=epoch?"),
]


@pytest.mark.parametrize(("mistake", "cause", "hint"), MISTAKES, ids=[mistake for mistake, _, _ in MISTAKES])
def test_a_mistake_is_reported_with_its_cause_and_a_hint(mistake: str, cause: str, hint: str) -> None:
    problems = problems_of(*mistake.split())
    assert len(problems) == 1
    first, *second = problems[0].splitlines()
    assert cause in first
    assert hint in " ".join([first, *second])
    assert len(second) == 1


@pytest.mark.parametrize(
    "override",
    ["data.pin_memory=on", "data.augment.rotate=3", "checkpoint.name=x", "early_stop.warmup=3", "monitor.x=1", "foo=1"],
)
def test_no_plus_sign_is_advised_for_a_key_that_a_section_cannot_have(override: str) -> None:
    (problem,) = problems_of(override)
    assert "+" not in problem


@pytest.mark.parametrize(
    "override",
    ["model.foo=1", "optim.foo=1", "data.train.foo=1", "param_groups.a.lr=1", "hooks.h.foo=1", "data.normalize.mean=1"],
)
def test_a_plus_sign_is_advised_for_a_key_that_can_be_added(override: str) -> None:
    (problem,) = problems_of(override)
    assert f"to add a new key write +{override}" in problem


@pytest.mark.parametrize(
    ("choice", "key"),
    [("data=imagefolder", "data.root=photos"), ("model=nothing", "model.widht=8"), ("model=nothing", "+model.depth=8")],
)
def test_a_key_below_a_wrong_choice_is_not_reported(choice: str, key: str) -> None:
    (problem,) = problems_of(choice, key)
    assert choice in problem


@pytest.mark.parametrize(
    ("choice", "hint"),
    [
        ("model=mynets", "write model=mynets.CLASS; the classes of mynets.py are Small, Large"),
        ("model=single", "write model=single.Net"),
        ("model=mynets:Small", "write model=mynets.Small"),
        ("optim=mynets", "write optim=mynets.CLASS"),
    ],
)
def test_a_module_as_a_choice_is_answered_with_its_classes(choice: str, hint: str, here: Path) -> None:
    classes = "class Small(nn.Module): ...\nclass Large(Small): ...\nclass Other: ...\n"
    (here / "mynets.py").write_text(f"from torch import nn\nraise SystemExit\n{classes}")
    (here / "single.py").write_text("from torch.nn import Module\nclass Net(Module): ...\n")
    (problem,) = problems_of(choice)
    assert problem.splitlines()[1].strip() == hint


def test_a_run_in_place_of_overrides_is_named(here: Path) -> None:
    (here / "outputs").mkdir()
    for word in ("last", "outputs"):
        (problem,) = problems_of(word)
        assert f"{word}: this command takes overrides, not a run" in problem


def test_hooks_may_add_the_monitored_metric() -> None:
    hook = "+hooks.h._target_=collections.Counter"
    settings = compose_run([hook, "monitor.metric=val/miou", "monitor.mode=max"]).settings
    assert (settings.monitor.metric, settings.monitor.mode) == ("val/miou", "max")
    (problem,) = problems_of(hook, "monitor.metric=val/miou")
    assert "monitor.mode: auto does not cover val/miou" in problem
    assert "write monitor.mode=min or monitor.mode=max" in problem


def test_the_mode_of_a_known_metric_is_found_automatically() -> None:
    for metric, mode in (("val/loss", "min"), ("train/loss", "min"), ("val/accuracy", "max")):
        assert compose_run([f"monitor.metric={metric}"]).settings.monitor.mode == mode


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_norm_of_the_gradient_may_be_monitored_in_both_modes(mode: str) -> None:
    assert compose_run(["monitor.metric=grad_norm", f"monitor.mode={mode}"]).settings.monitor.mode == mode


def test_all_mistakes_are_reported_together() -> None:
    problems = problems_of("optim=sgdd", "lr=-1", "epoch=3", "model.chanels=4", "optim.momentum=x y", "data.split=2")
    assert len(problems) == 5  # torch itself checks the type of momentum
    assert all(any(word in p for p in problems) for word in ("sgdd", "lr=-1", "epoch=3", "chanels", "split"))


def test_an_unknown_key_is_an_error_unless_an_interpolation_refers_to_it(here: Path) -> None:
    (here / "conf" / "data").mkdir(parents=True)
    file = here / "conf" / "data" / "mine.yaml"
    file.write_text("train:\n  _target_: trainkit.data.synthetic\n  size: ${data.count}\ncount: 7\nclasses: 3\n")
    assert compose(["data=mine"]).data.train.size == 7
    assert compose(["data=mine"]).data.num_workers == 0  # inherited
    file.write_text("train: {_target_: trainkit.data.synthetic}\ncount: 7\nnum_worker: 3\n")
    problems = problems_of("data=mine")
    assert len(problems) == 2
    assert "data.count" in problems[0]
    assert "did you mean data.num_workers?" in problems[1]


def test_a_wrong_interpolation_is_reported_with_the_nearest_key(here: Path) -> None:
    (here / "conf" / "model").mkdir(parents=True)
    (here / "conf" / "model" / "mine.yaml").write_text(
        "_target_: trainkit.models.ToyCNN\nnum_classes: ${data.clases}\n"
    )
    (problem,) = problems_of("model=mine")
    assert "model.num_classes" in problem
    assert "did you mean ${data.classes}?" in problem


def test_broken_yaml_is_reported_with_file_and_line(here: Path) -> None:
    (here / "conf" / "model").mkdir(parents=True)
    (here / "conf" / "model" / "mine.yaml").write_text("_target_: trainkit.models.ToyCNN\n  bad: [1\n")
    (problem,) = problems_of("model=mine")
    assert "mine.yaml, line" in problem


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("lr: 1\n", "experiment: the key does not exist", "# @package _global_"),
        ("# an experiment\n# @package _global_\ndefaults: [override /optim: adam]\n", "mine", "let the first line"),
        ("# @package _global_\ndefaults: [override /optm: adam]\n", "optm", "did you mean override /optim?"),
        ("# @package _global_\ndefaults: [override /optim: admm]\n", "admm", "did you mean optim: adam?"),
        ("# @package _global_\ndefaults: [mine]\n", "include the config itself", "override /GROUP: NAME"),
        ("# @package _global_\nmodel: {in_channels: }\nlr: [\n", "mine.yaml, line", "correct the YAML"),
    ],
)
def test_a_mistake_in_an_experiment_file_is_reported_with_a_hint(text: str, cause: str, hint: str, here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text(text)
    (problem,) = problems_of("experiment=mine")
    assert cause in problem
    assert hint in problem


def test_the_run_directory_may_contain_interpolations() -> None:
    composed = compose_run(["hydra.run.dir=runs/${hydra.job.override_dirname}", "lr=0.1"])
    assert composed.directory == Path("runs/lr=0.1")
    assert compose_run(["++hydra.run.dir=here"]).directory == Path("here")
    assert compose_run([]).directory is None


def test_user_configs_cannot_shadow_shipped_configs(here: Path) -> None:
    (here / "conf" / "model").mkdir(parents=True)
    (here / "conf" / "model" / "toy_cnn.yaml").write_text("_target_: somewhere.Else\n")
    assert compose([]).model["_target_"] == "trainkit.models.ToyCNN"
    assert [file.name for file, _ in ignored_configs()] == ["toy_cnn.yaml"]


def test_setting_lr_is_an_error_if_the_optimizer_config_does_not_use_it(here: Path) -> None:
    (here / "conf" / "optim").mkdir(parents=True)
    (here / "conf" / "optim" / "mine.yaml").write_text("_target_: torch.optim.SGD\nmomentum: 0.9\n")
    assert compose(["optim=mine"]).optim.momentum == 0.9
    (problem,) = problems_of("optim=mine", "lr=0.1")
    assert "does not use it" in problem


def test_all_mistakes_of_a_sweep_are_reported_before_training() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_sweep(["optim=sgd,admm", "lr=0.1,-1", "epochs=2"])
    message = str(caught.value)
    assert "did you mean optim=adam?" in message
    assert "lr=-1" in message
    with pytest.raises(ConfigError) as caught:
        compose_sweep(["lr=0.1,-1", "epohcs=2", "optim=glob(ad*)"])
    message = str(caught.value)
    assert "did you mean epochs?" in message
    assert "lr=-1" in message


@pytest.mark.parametrize(
    ("sweep", "jobs"),
    [
        (["optim=sgd,adam", "seed=1,2,3"], 6),
        (["seed=range(4)"], 4),
        (["optim=glob(ad*)"], 6),
        (["lr=0.1"], 1),
        pytest.param(["seed=range(0,50000)"], 200, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_lists_its_jobs_before_training(sweep: list[str], jobs: int) -> None:
    composed = compose_sweep(sweep)
    assert len(composed.jobs) == jobs
    assert composed.more_jobs == ("range(0,50000)" in sweep[0])


@pytest.mark.parametrize("endless", ["seed=range(0,100000000)", "lr=interval(0,1)"])
def test_a_sweep_with_endless_values_is_an_error(endless: str) -> None:
    with pytest.raises(ConfigError):
        compose_sweep([endless])


@pytest.mark.parametrize(
    ("overrides", "libraries"),
    [
        ([], []),
        (["data=cifar10"], ["torchvision"]),
        (["data=image_folder", "data.root=images"], []),
        (["model=torchvision.models.resnet18"], ["torchvision"]),
    ],
)
def test_the_large_libraries_of_a_job_are_those_of_its_targets(overrides: list[str], libraries: list[str]) -> None:
    assert libraries_of(compose_run(overrides).settings.source) == libraries


def test_the_key_on_of_a_metric_needs_no_quotes_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    node = "{_target_: trainkit.metrics.TopK, k: 3, on: [train, val]}"  # YAML 1.1 reads this key as true
    for file, text in (("metrics/mine", f"top3: {node}"), ("experiment/mine", f"metrics: {{top3: {node}}}")):
        path = tmp_path / "conf" / f"{file}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("# @package _global_\n" * file.startswith("experiment") + text)
    for choice in ("metrics=mine", "experiment=mine"):
        assert compose([choice]).metrics.top3 == {"_target_": "trainkit.metrics.TopK", "k": 3, "on": ["train", "val"]}
        assert compose([choice, "metrics.top3.on=[val]"]).metrics.top3.on == ["val"]
        jobs = compose_sweep([choice, "lr=0.1,0.2"]).jobs
        assert [job.settings.metrics["top3"]["on"] for job in jobs] == [["train", "val"]] * 2

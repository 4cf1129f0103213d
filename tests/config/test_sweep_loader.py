"""The jobs of a sweep: composed from common parts, and equal to jobs that are composed alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from trainkit.config.compose import _values, compose_run, compose_sweep
from trainkit.config.search_path import make_loader
from trainkit.core.errors import ConfigError

SWEEPS = {
    "values": ["lr=0.1,0.2", "data.augment.flip=true,off", "epochs=2"],
    "groups": ["optim=sgd,adam,adamw", "model=mlp,toy_cnn", "scheduler=onecycle", "lr=0.1"],
    "dotted choices": ["optim=torch.optim.AdamW,torch.optim.SGD,adam", "optim.weight_decay=0.1", "lr=0.1"],
    "targets": ["optim._target_=torch.optim.Adagrad,torch.optim.SGD", "lr=0.1,0.2"],
    "new and deleted keys": ["+hooks.mine._target_=builtins.dict,builtins.list", "~model.out_features", "model=mlp"],
    "mappings": ["+model.inner={a: 1},{a: 2, b: [1, 2]}", "data.normalize={mean: 0, std: 1},off"],
    "lists": ["watch=[],[a],[a,b]", "++optim.betas=[0.9,0.99],[0.8,0.9]", "optim=adam"],
    "experiments": ["experiment=line_fit,polynomial", "lr=0.1,0.2"],
    "hydra's own keys": [
        "hydra.job.name=mine",
        "lr=0.1,0.2",
        "hydra.sweep.dir=there",
        "+model.note='${hydra:job.name}'",
    ],
    "interpolations": ["+data.width=1,2", "+model.width=${data.width}", "model=mlp"],
    "errors": ["lr=-1,fast", "optim=sgdd,adam", "batch_sise=2", "~model.missing", "+model.width=${nothing}"],
    "own groups": ["data=mine", "data.root=a,b", "+group=one,two"],
}


@pytest.fixture
def folder(here: Path) -> Path:
    """Return a working directory with configs of the user."""
    for name, text in (
        ("data/mine", "root: ???\ntrain: {_target_: builtins.dict, root: '${data.root}'}\nclasses: 2\n"),
        ("group/one", "# @package _global_\ndefaults:\n  - override /optim: adam\nlr: 0.5\n"),
        ("group/two", "# @package _global_\nbatch_size: 7\n"),
    ):
        (here / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "conf" / f"{name}.yaml").write_text(text)
    return here


def plain(composed: Any) -> Any:
    """Return everything about a composed job, in a form that can be compared."""
    hydra = OmegaConf.to_container(composed.hydra, resolve=False)
    source = OmegaConf.to_yaml(composed.settings.source)
    return source, hydra, list(composed.overrides), composed.notes, composed.directory


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.usefixtures("folder")
def test_the_jobs_of_a_sweep_equal_jobs_that_are_composed_alone(name: str) -> None:
    problems: list[Any] = []
    try:
        jobs = compose_sweep(SWEEPS[name]).jobs
    except ConfigError as error:
        problems = error.problems
        jobs = []
    assert bool(problems) == (name == "errors"), problems
    overrides = [list(job.overrides) for job in jobs] or expand(SWEEPS[name])
    assert len(overrides) > 1
    alone = []
    expected: list[Any] = []
    for job in overrides:
        try:
            alone.append(compose_run(job))
        except ConfigError as error:
            expected += error.problems
    assert problems == list(dict.fromkeys(expected))
    if not problems:
        assert [job.settings for job in jobs] == [job.settings for job in alone]
        assert [plain(job) for job in jobs] == [plain(job) for job in alone]


def expand(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job of a sweep that cannot be composed."""
    loader = make_loader()
    return [list(job) for job in itertools.product(*(_values(loader, text) for text in overrides))]


@pytest.mark.usefixtures("folder")
def test_each_combination_of_group_choices_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []
    compose = ConfigLoaderImpl._load_configuration_impl

    def counting(self: Any, config_name: Any, overrides: list[str], *args: Any, **kwargs: Any) -> Any:
        composed.append(overrides)
        return compose(self, config_name, overrides, *args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counting)
    rates = ",".join(str(0.01 * (number + 1)) for number in range(30))
    sweep = compose_sweep([f"lr={rates}", "optim=sgd,adam", "epochs=1"])
    assert len(sweep.jobs) == 60
    assert len(composed) == 3  # two optimizers, and the whole sweep


@pytest.mark.usefixtures("folder")
def test_a_wrong_value_in_a_late_job_is_an_error_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.config.compose.MAX_CHECKED_JOBS", 20)
    rates = [str(0.01 * (number + 1)) for number in range(20)]
    rates[18], rates[19] = "-1", "fast"
    with pytest.raises(ConfigError) as raised:
        compose_sweep([f"lr={','.join(rates)}", "epochs=1"])
    assert [problem.cause.partition(":")[0] for problem in raised.value.problems] == ["lr=-1", "lr=fast"]
    more = compose_sweep(["seed=range(21)"])
    assert (len(more.jobs), more.more_jobs) == (20, True)


def test_later_jobs_do_not_see_configs_that_change_during_the_sweep(folder: Path) -> None:
    sweep = compose_sweep(["+group=one", "seed=0,1"])
    master = sweep.loader.load_configuration("config", ["+group=one", "seed=0"], RunMode.RUN)
    (folder / "conf" / "group" / "one.yaml").write_text("# @package _global_\nlr: 9\n")
    assert sweep.loader.load_sweep_config(master, ["+group=one", "seed=1"]).lr == 0.5

"""What is wrong with the keys of a search, as `compose_sweep` reports it: nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainkit.config.compose import Sweep, compose_sweep
from trainkit.config.search_space import Axis
from trainkit.core.errors import ConfigError

LR = "lr=interval(0.1,1)"
TRIALS = "search.trials=3"
ASHA = (LR, TRIALS, "search.pruner=asha")


def axes_of(*overrides: str) -> list[Axis]:
    """Return the axes of a search."""
    space = compose_sweep(overrides).space
    assert space is not None
    return space.axes


def overrides_of(sweep: Sweep) -> list[list[str]]:
    """Return the overrides of the checked jobs."""
    return [list(job.overrides) for job in sweep.jobs]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder of experiments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    return tmp_path


def write_experiment(folder: Path, name: str, text: str) -> None:
    """Write an experiment."""
    (folder / f"conf/experiment/{name}.yaml").write_text(f"# @package _global_\n{text}\n")


@pytest.mark.parametrize(
    ("overrides", "cause", "hint"),
    [
        ((LR, "search.trials=2,3"), "search.trials is the same for all jobs", "write one value"),
        ((LR, TRIALS, "search.pruner=asha,median"), "search.pruner is the same", "write one value"),
        (("lr=0.1,0.2", "hydra.launcher.n_jobs=1,2"), "hydra.launcher.n_jobs is the same", "write one value"),
        ((LR, "search=3"), "search=3: must be a mapping", "search.trials=3"),
        (("lr=0.1,0.2", "search=3"), "search=3: must be a mapping", "search.trials=3"),
        (("lr=0.1,0.2", "search.pruner=asha"), "the search has no end", "search.trials=N"),
        (("lr=interval(0.1,0.1)", TRIALS), "the interval is empty", "a single value: lr=0.1"),
        (("lr=interval(1)", TRIALS), "lr=interval(1): missing a required argument: 'end'", "KEY=interval(LOW,HIGH)"),
        (("lr=interval(a,b)",), "lr=interval(a,b): mismatch type", "KEY=interval(LOW,HIGH)"),
        (("lr=interval(0,1),2",), "cannot be a value of a list", "KEY=interval(LOW,HIGH)"),
        (("lr=interval(0,1),2", TRIALS), "cannot be a value of a list", "KEY=interval(LOW,HIGH)"),
        (("lr=range(0.1,1,0)", TRIALS), "lr=range(0.1,1,0): the step is 0", "range(START,STOP,STEP)"),
        (("batch_size=interval(16,64)", TRIALS), "must be a whole number", "'batch_size=int(interval(16,64))'"),
        (("batch_size=tag(log,interval(16,64))", TRIALS), "must be a whole number", "int(tag(log,interval(16,64)))"),
        ((LR, TRIALS, "hydra/sweeper=optuna"), "hydra/sweeper has no choice 'optuna'", "basic, trainkit"),
        (("hydra.sweeper.params.lr=0.1,0.2",), "for config files", "write lr=0.1,0.2"),
        (("+hydra.sweeper.params.lr=interval(0,1)", TRIALS), "for config files", "write lr=interval(0,1)"),
        (('+hydra.sweeper.params={lr:"0.1,0.2"}',), "for config files", "write KEY=VALUE"),
        ((*ASHA, "checkpoint=off"), "continues paused trials from their checkpoints", "remove checkpoint=off"),
        ((*ASHA, "epochs=5,10"), "trainings of the same length", "give epochs a single value"),
        ((*ASHA, "epochs=5,10", "search.max_epochs=4"), "the search varies epochs", "remove search.max_epochs"),
        ((*ASHA, "steps=9", "search.max_epochs=4"), "a run has one of them", "remove steps"),
        ((*ASHA, "steps=9"), "needs the number of epochs", "epochs=N instead of steps=N"),
        ((LR, TRIALS, "monitor.metric=val/loss,val/accuracy"), "monitor.metric has several values", "command line"),
        (
            (LR, TRIALS, "metrics=classification", "monitor.metric=val/f1"),
            "monitor.mode=auto: a search must know",
            "monitor.mode=max",
        ),
    ],
)
def test_a_wrong_search_is_refused_with_the_fix(overrides: tuple[str, ...], cause: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_sweep(overrides)
    assert cause in str(refused.value)
    assert hint in str(refused.value)
    assert "\\x0a" not in str(refused.value)


def test_a_key_of_the_search_on_the_command_line_makes_a_sweep_a_search() -> None:
    assert axes_of("lr=0.1,0.2", "search.sampler=grid")[0].choices == ("0.1", "0.2")


def test_a_budget_that_is_off_makes_no_search(folder: Path) -> None:
    write_experiment(folder, "mine", "search: {trials: 4}")
    assert compose_sweep(["lr=0.1,0.2", "experiment=mine"]).space is not None
    assert compose_sweep(["lr=0.1,0.2", "experiment=mine", "search.trials=off"]).space is None


def test_the_choices_of_a_shuffled_list_have_the_same_order_again() -> None:
    given = ("lr=shuffle(1,2,3,4,5,6,7,8)", TRIALS)
    assert axes_of(*given) == axes_of(*given) == axes_of("lr=1,2,3,4,5,6,7,8", TRIALS)


def test_choices_of_config_files_must_agree_on_the_metric(folder: Path) -> None:
    write_experiment(folder, "a", "epochs: 3")
    write_experiment(folder, "b", "monitor: {metric: train/loss}")
    with pytest.raises(ConfigError, match=r"monitor.metric has several values by the choice of experiment"):
        compose_sweep(["experiment=a,b", TRIALS])
    assert axes_of("experiment=a,b", TRIALS, "monitor.metric=val/loss")


def test_params_of_a_config_are_checked_in_a_sweep_over_listed_values(folder: Path) -> None:
    write_experiment(folder, "mine", "hydra: {sweeper: {params: {lr: '0.1,0.2', epochs: '1,2'}}}")
    jobs = compose_sweep(["experiment=mine", "epochs=3"])
    assert overrides_of(jobs) == [[f"lr={lr}", "experiment=mine", "epochs=3"] for lr in (0.1, 0.2)]
    write_experiment(folder, "wrong", "hydra: {sweeper: {params: {lrr: '0.1,0.2'}}}")
    with pytest.raises(ConfigError, match="did you mean lr"):
        compose_sweep(["experiment=wrong"])

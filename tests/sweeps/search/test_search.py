"""A search through the command: what is sampled, stopped, promoted, counted, resumed and shared."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tests.processes import Forks, Process, until
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.history import History
from trainkit.runs.snapshot import digest
from trainkit.sweeps.ledger import JobRecord, Ledger, read_ledger

OPTIONS = ("-m", "model=mlp", "limit_batches=3", "report=off", "hydra.launcher.n_jobs=1")
BASE = (*OPTIONS, "hydra.sweep.dir=S")
LR = "lr=tag(log,interval(1e-3,3))"
ASHA = (LR, "optim=sgd,adam", "optim.momentum=interval(0,0.9)", "epochs=9", "search.pruner=asha")

MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, fault=0.0):
        super().__init__()
        if fault > 0.5:
            raise ValueError("broken on purpose")
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

    def forward(self, images):
        return self.layers(images)
"""


def jobs_of(folder: Path, sweep: str = "S") -> list[JobRecord]:
    """Return the jobs of a sweep in a folder."""
    return read_ledger(folder / sweep)


def trials_of(folder: Path, sweep: str = "S") -> list[FrozenTrial]:
    """Return the trials of a search, read by Optuna's own loader."""
    storage = JournalStorage(JournalFileBackend(str(folder / sweep / "study.journal")))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def state_of(run: Path) -> str:
    """Return the hash of the newest checkpoint of a run."""
    return digest(Checkpoints(run / "checkpoints").newest()[1])


def values_of(run: Path) -> list[float]:
    """Return the validation loss of each epoch."""
    return [row["val/loss"] for row in History(run / "history.jsonl").rows]


def check_agreement(folder: Path, sweep: str = "S", seeds: int = 1) -> None:
    """Check that ledger, study and histories say the same about each trial, and that no trial is lost or repeated."""
    jobs, trials = jobs_of(folder, sweep), trials_of(folder, sweep)
    assert [job.number for job in jobs] == sorted({job.number for job in jobs})
    assert {job.trial for job in jobs} == {trial.number for trial in trials}
    settings = Counter(json.dumps(trial.params, sort_keys=True) for trial in trials)
    assert max(settings.values()) == 1
    events = [json.loads(line) for line in (folder / sweep / "sweep.jsonl").read_text().splitlines()]
    queued = Counter(event["job"] for event in events if event["event"] == "queued")
    assert set(queued.values()) == {1}
    states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    for job in jobs:
        trial = trials[job.trial or 0]
        assert job.number == trial.number * seeds + job.repeat
        if seeds == 1:
            assert trial.state is states.get(job.status, TrialState.RUNNING), job
        if job.status == "paused":
            assert trial.user_attrs["status"] == "paused"
        if job.repeat == 0 and job.status != "failed":
            reported = [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)]
            assert reported == values_of(job.directory)[: len(reported)]
        if job.status == "completed" and seeds == 1:
            assert trial.value == min(values_of(job.directory))


def settings_of(folder: Path, sweep: str) -> list[tuple[Any, ...]]:
    """Return what a search has tried, in order: the setting, how it ended, and all its values."""
    return [
        (trial.params, trial.state, trial.intermediate_values, trial.user_attrs.get("rungs"))
        for trial in trials_of(folder, sweep)
    ]


# --------------------------------------------------------------------------------------- what is sampled


def test_a_key_of_one_choice_is_sampled_for_this_choice_only(tmp_path: Path, forks: Forks) -> None:
    momentum = "optim.momentum=interval(0,0.9)"
    forks.run(*BASE, LR, "optim=sgd,adam", momentum, "epochs=1", "search.trials=6", cwd=tmp_path)
    check_agreement(tmp_path)
    found = [trial.params for trial in trials_of(tmp_path)]
    assert {params["optim"] for params in found} == {"sgd", "adam"}
    assert all(("optim.momentum" in params) == (params["optim"] == "sgd") for params in found)
    assert all(1e-3 <= params["lr"] <= 3 for params in found)
    for job, params in zip(jobs_of(tmp_path), found, strict=True):
        config = (job.directory / ".hydra/config.yaml").read_text()
        assert f"lr: {params['lr']!r}" in config


@pytest.mark.parametrize(
    "sampler", ["tpe", "qmc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "cmaes", "gp"))]
)
def test_a_sampler_gives_the_same_settings_after_a_restart(sampler: str, tmp_path: Path, forks: Forks) -> None:
    command = (*OPTIONS, LR, "optim.weight_decay=interval(0,0.1)", "epochs=1", f"search.sampler={sampler}")
    forks.run(*command, "search.trials=4", "hydra.sweep.dir=whole", cwd=tmp_path)
    forks.run(*command, "search.trials=2", "hydra.sweep.dir=parts", cwd=tmp_path)
    forks.run("resume", "parts", "search.trials=4", cwd=tmp_path)
    assert settings_of(tmp_path, "whole") == settings_of(tmp_path, "parts")
    check_agreement(tmp_path, "parts")


def test_a_grid_tries_each_combination_once_and_ends(tmp_path: Path, forks: Forks) -> None:
    axes = ("optim=sgd,adam", "optim.momentum=0.1,0.5", "batch_size=range(16,49,16)")
    forks.run(*BASE, *axes, "epochs=1", "search.sampler=grid", "search.trials=100", cwd=tmp_path)
    check_agreement(tmp_path)
    found = [tuple(sorted(trial.params.items())) for trial in trials_of(tmp_path)]
    assert len(found) == len(set(found)) == 2 * 3 + 3  # sgd with two momenta, adam


def test_params_of_a_config_are_searched_too(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra: {sweeper: {params: {lr: 'interval(0.1,0.2)'}}}\nsearch: {trials: 2}\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(text)
    forks.run(*BASE, "experiment=mine", "epochs=1", cwd=tmp_path)
    assert [0.1 <= trial.params["lr"] <= 0.2 for trial in trials_of(tmp_path)] == [True, True]


# -------------------------------------------------------------------------------- stopped and promoted


def check_rungs(folder: Path, reduction: int = 3) -> int:
    """Check ASHA's rule against the histories; return how many trials were promoted."""
    jobs = jobs_of(folder)
    best = {job.number: [min(values_of(job.directory)[: epoch + 1]) for epoch in range(epochs_of(job))] for job in jobs}
    for rung in (1, 3):
        reached = sorted(best[job.number][rung - 1] for job in jobs if epochs_of(job) >= rung)
        beyond = sum(epochs_of(job) > rung for job in jobs)
        assert (
            beyond >= len(reached) // reduction - 1
        )  # each of the best is promoted, unless it was another at the time
        worst = max((best[job.number][rung - 1] for job in jobs if epochs_of(job) > rung), default=-math.inf)
        assert not reached or worst < reached[-1] or len(reached) == 1  # the worst is never promoted
    return sum(job.attempts > 1 for job in jobs)


def epochs_of(job: JobRecord) -> int:
    """Return the epochs that a job has trained."""
    return len(values_of(job.directory))


def test_a_promoted_trial_ends_with_the_bits_of_a_run_that_was_never_paused(tmp_path: Path, forks: Forks) -> None:
    done = forks.run(*BASE, *ASHA, "search.trials=9", cwd=tmp_path)
    check_agreement(tmp_path)
    assert {epochs_of(job) for job in jobs_of(tmp_path)} == {1, 3, 9}
    assert check_rungs(tmp_path) > 0
    promoted = [job for job in jobs_of(tmp_path) if job.status == "completed" and job.attempts > 1]
    assert promoted
    assert "paused" in done.stderr
    check_bits(tmp_path, promoted[:1], forks)


def check_bits(folder: Path, jobs: list[JobRecord], forks: Forks) -> None:
    """Check that the runs of some jobs equal runs that are trained straight with the same overrides."""
    for job in jobs:
        forks.run(*job.overrides, f"hydra.run.dir=straight{job.number}", cwd=folder)
        straight = folder / f"straight{job.number}"
        assert values_of(job.directory) == values_of(straight)
        assert state_of(job.directory) == state_of(straight)


@pytest.mark.slow
def test_ten_promoted_trials_end_with_the_bits_of_straight_runs(tmp_path: Path, forks: Forks) -> None:
    rungs = ("epochs=4", "search.min_epochs=2", "search.reduction=2", "search.seeds=2")  # seeds wait for each other
    forks.run(*BASE, *ASHA, *rungs, "scheduler=cosine", "ema=0.9", "search.trials=12", cwd=tmp_path)
    check_agreement(tmp_path, seeds=2)
    promoted = [job for job in jobs_of(tmp_path) if job.status == "completed" and job.attempts > 1]
    assert len(promoted) >= 10
    check_bits(tmp_path, promoted[:10], forks)


@pytest.mark.parametrize(
    "pruner",
    ["median", *(pytest.param(n, marks=pytest.mark.slow) for n in ("percentile", "patient", "wilcoxon", "hyperband"))],
)
def test_a_pruner_stops_bad_trials_for_ever(pruner: str, tmp_path: Path, forks: Forks) -> None:
    options = ("search.trials=12", f"search.pruner={pruner}", "search.sampler=random", "search.patience=1")
    forks.run(*BASE, "optim=adam", "lr=tag(log,interval(1e-4,3))", "epochs=8", *options, cwd=tmp_path)
    check_agreement(tmp_path)
    statuses = Counter(job.status for job in jobs_of(tmp_path))
    assert set(statuses) == {"completed", "pruned"}
    best = min(jobs_of(tmp_path), key=lambda job: job.value if job.value is not None else math.inf)
    assert best.status == "completed"
    events = len((tmp_path / "S/sweep.jsonl").read_text().splitlines())
    forks.run("resume", "S", cwd=tmp_path)
    later = (tmp_path / "S/sweep.jsonl").read_text().splitlines()[events:]
    assert not [line for line in later if '"started"' in line]


# --------------------------------------------------------------------------------------------- budgets


def test_the_epochs_of_a_budget_are_used_exactly_and_a_larger_budget_goes_on(tmp_path: Path, forks: Forks) -> None:
    forks.run(*BASE, LR, "epochs=4", "search.epochs=10", cwd=tmp_path)
    assert [epochs_of(job) for job in jobs_of(tmp_path)] == [4, 4, 2]
    assert [job.status for job in jobs_of(tmp_path)] == ["completed", "completed", "paused"]
    forks.run("resume", "S", "search.epochs=12", cwd=tmp_path)
    assert [epochs_of(job) for job in jobs_of(tmp_path)] == [4, 4, 4]
    check_agreement(tmp_path)
    check_bits(tmp_path, jobs_of(tmp_path)[2:], forks)


def test_no_trial_begins_after_the_minutes_are_over(tmp_path: Path, forks: Forks) -> None:
    forks.run(*BASE, LR, "epochs=20000", "search.minutes=0.1", cwd=tmp_path)
    (job,) = jobs_of(tmp_path)[-1:]
    assert job.status == "paused"
    assert 0 < epochs_of(job) < 20000


def test_a_failed_trial_counts_as_a_trial_without_a_value(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    command = (*BASE, "model._target_=mine.Net", "+model.fault=interval(0,1)", "epochs=1", "search.trials=6")
    process = forks.start(*command, "search.sampler=random", cwd=tmp_path)
    assert process.wait() == 10, process.stderr
    check_agreement(tmp_path)
    failed = [trial for trial in trials_of(tmp_path) if trial.state is TrialState.FAIL]
    assert 0 < len(failed) < 6
    assert all(trial.params["model.fault"] > 0.5 and trial.value is None for trial in failed)


def test_a_search_whose_trials_all_fail_ends_although_its_epochs_are_not_used(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    command = (*BASE, "model._target_=mine.Net", "+model.fault=interval(0.6,1)", "epochs=1", "search.epochs=50")
    process = forks.start(*command, cwd=tmp_path)
    assert process.wait() == 10, process.stderr
    assert "10 trials in a row failed before their first epoch" in process.stderr
    assert [job.status for job in jobs_of(tmp_path)] == ["failed"] * 10


@pytest.mark.parametrize("pruner", [pytest.param("off", marks=pytest.mark.slow), "median", "asha"])
def test_the_mean_of_all_seeds_is_the_value_of_a_trial(pruner: str, tmp_path: Path, forks: Forks) -> None:
    options = ("search.trials=6", "search.seeds=2", f"search.pruner={pruner}", "search.max_epochs=3", "seed=5")
    forks.run(*BASE, LR, *options, cwd=tmp_path)
    check_agreement(tmp_path, seeds=2)
    jobs, trials = jobs_of(tmp_path), trials_of(tmp_path)
    for trial in trials:
        own = [job for job in jobs if job.trial == trial.number]
        if trial.state is TrialState.COMPLETE:
            assert [f"seed={5 + place}" in job.overrides for place, job in enumerate(own)] == [True, True]
            assert trial.value == sum(min(values_of(job.directory)) for job in own) / 2
        if trial.user_attrs.get("rungs"):
            first = [min(values_of(job.directory)[:1]) for job in own]
            assert trial.user_attrs["rungs"]["1"] == sum(first) / 2
    assert any(trial.state is TrialState.COMPLETE for trial in trials)


# ----------------------------------------------------------------------------- killed, shared, refused


def kill_search(process: Process, folder: Path, sweep: str) -> None:
    """Kill the process of a search with SIGKILL, and wait until its jobs have noticed it and ended."""
    process.send(signal.SIGKILL)
    process.wait()
    until(lambda: all(not is_running(job.directory) for job in jobs_of(folder, sweep)), timeout=60)


def is_running(directory: Path) -> bool:
    """Return whether a process trains in a directory."""
    info = Run.load(directory).info if (directory / "run.json").exists() else {}
    if info.get("status") != "running":
        return False
    return Path(f"/proc/{info['pid']}").exists()


@pytest.mark.parametrize(
    "moment", [2, pytest.param(5, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_a_killed_search_resumes_to_the_trials_of_an_unbroken_one(moment: int, tmp_path: Path, forks: Forks) -> None:
    command = (*OPTIONS, *ASHA, "search.trials=8")
    forks.run(*command, "hydra.sweep.dir=whole", cwd=tmp_path)
    process = forks.start(*command, "hydra.sweep.dir=S", cwd=tmp_path)
    until(lambda: sum(epochs_of(job) for job in jobs_of(tmp_path)) >= moment, timeout=120)
    kill_search(process, tmp_path, "S")
    forks.run("resume", "S", cwd=tmp_path)
    check_agreement(tmp_path)
    assert settings_of(tmp_path, "S") == settings_of(tmp_path, "whole")
    for job, other in zip(jobs_of(tmp_path), jobs_of(tmp_path, "whole"), strict=True):
        assert state_of(job.directory) == state_of(other.directory)


def test_ctrl_c_saves_the_running_trial_and_the_same_command_goes_on(tmp_path: Path, forks: Forks) -> None:
    command = (*BASE, LR, "epochs=30", "search.trials=2")
    process = forks.start(*command, cwd=tmp_path)
    until(lambda: sum(epochs_of(job) for job in jobs_of(tmp_path)) >= 2, timeout=120)
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.stderr
    assert "to continue: trainkit resume S" in process.stderr
    assert [job.status for job in jobs_of(tmp_path)] == ["stopped"]
    forks.run(*command, cwd=tmp_path)
    check_agreement(tmp_path)
    assert [job.status for job in jobs_of(tmp_path)] == ["completed", "completed"]
    check_bits(tmp_path, jobs_of(tmp_path)[:1], forks)


@pytest.mark.parametrize(("workers", "trials"), [(2, 6), pytest.param(4, 40, marks=pytest.mark.slow)])
def test_several_processes_share_a_search_and_no_trial_runs_twice(
    workers: int, trials: int, tmp_path: Path, forks: Forks
) -> None:
    command = (*BASE, *ASHA, f"search.trials={trials}")
    processes = [forks.start(*command, cwd=tmp_path) for _ in range(workers)]
    assert [process.wait() for process in processes] == [0] * workers, [p.stderr for p in processes]
    check_agreement(tmp_path)
    assert len(trials_of(tmp_path)) == trials
    assert len({trial.user_attrs["worker"] for trial in trials_of(tmp_path)}) > 1
    attempts = [json.loads(line) for line in (tmp_path / "S/sweep.jsonl").read_text().splitlines()]
    running: set[int] = set()
    for event in attempts:  # no job starts while it runs
        if event["event"] == "started":
            assert event["job"] not in running
            running.add(event["job"])
        elif event["event"] == "ended":
            running.discard(event["job"])


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a new PostgreSQL server."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    data = Path(tempfile.mkdtemp(dir="/tmp"))  # the path of a socket is at most 107 characters long
    user = ["runuser", "-u", "postgres", "--"] if Path("/root").owner() == Path.home().owner() == "root" else []
    if user:
        shutil.chown(data, "postgres")
    try:
        for program in (
            ["initdb", "-D", str(data / "db"), "-U", "postgres", "-A", "trust"],
            ["pg_ctl", "-D", str(data / "db"), "-w", "-o", f"-k {data} -p 54329 -c listen_addresses=", "start"],
        ):
            done = subprocess.run(
                [*user, str(folders[-1] / program[0]), *program[1:]], cwd="/tmp", stdout=subprocess.DEVNULL, check=False
            )
            assert done.returncode == 0
        yield f"postgresql://postgres@/postgres?host={data}&port=54329"
    finally:
        stop = [str(folders[-1] / "pg_ctl"), "-D", str(data / "db"), "-m", "immediate", "stop"]
        subprocess.run([*user, *stop], cwd="/tmp", stdout=subprocess.DEVNULL, check=False)
        shutil.rmtree(data, ignore_errors=True)


@pytest.mark.slow
def test_a_postgresql_database_holds_the_study(postgres: str, tmp_path: Path, forks: Forks) -> None:
    command = (*BASE, *ASHA, "search.trials=6", f"search.storage='{postgres}'")
    forks.run(*command, cwd=tmp_path)
    assert not (tmp_path / "S/study.journal").exists()
    storage = RDBStorage(postgres)
    try:
        (name,) = optuna.get_all_study_names(storage)
        trials = optuna.load_study(study_name=name, storage=storage).trials
    finally:  # an open connection would be reported in another test
        storage.remove_session()
        storage.engine.dispose()
    assert [trial.number for trial in trials] == [job.trial for job in jobs_of(tmp_path)] == [*range(6)]
    search = Ledger(tmp_path / "S").search()
    assert search is not None
    assert search["study"] == name


@pytest.mark.parametrize(
    ("overrides", "cause", "hint"),
    [
        (["lrr=interval(0,1)"], "lrr", "did you mean lr"),
        (["lr=interval(1,0)"], "the interval is empty", "interval(0,1)"),
        (["lr=tag(log,interval(0,1))"], "must be above 0", "low end above 0"),
        (["lr=interval(0,1)", "optim=sgd,adam", "search.sampler=cmaes"], "samples numbers only", "search.sampler=tpe"),
        (["lr=interval(0,1)", "optim=sgd,adam", "search.sampler=qmc"], "samples numbers only", "search.sampler=tpe"),
        (["lr=interval(0,1)", "search.sampler=cmaes"], "at least two keys", "search.sampler=tpe"),
        (["lr=interval(0,1)", "search.sampler=grid"], "cannot be listed", "list the values"),
        (["lr=interval(-1,1)"], "lr=-1", "lr=0.01"),
        (["optim=sgd,adamm", "lr=interval(0,1)"], "no choice 'adamm'", "did you mean optim=adam"),
        (["lr=interval(0,1)", "search.pruner=ashaa"], "search.pruner=ashaa", "did you mean search.pruner=asha"),
        (["lr=interval(0,1)", "search.pruner=asha", "epochs=1"], "search.min_epochs=1", "search.max_epochs"),
        (["lr=tag(lg,interval(0.1,1))"], "unknown tag lg", "log"),
        (["seed=int(interval(0,9))", "search.seeds=3"], "varies seed already", "search.seeds=1"),
        (["lr=interval(0,1)", "monitor.metric=val/lss"], "val/lss", "val/loss"),
    ],
)
def test_a_wrong_search_is_refused_with_the_fix(
    overrides: list[str], cause: str, hint: str, tmp_path: Path, forks: Forks
) -> None:
    process = forks.start("-m", *overrides, "search.trials=3", "hydra.sweep.dir=S", cwd=tmp_path)
    assert process.wait() == 2, process.stderr
    assert cause in process.stderr
    assert hint in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "S/sweep.jsonl").exists()


def test_a_search_without_an_end_is_refused(tmp_path: Path, forks: Forks) -> None:
    process = forks.start("-m", LR, "hydra.sweep.dir=S", cwd=tmp_path)
    assert process.wait() == 2
    assert "the search has no end" in process.stderr
    assert "search.trials=N" in process.stderr


def test_a_folder_holds_one_search(tmp_path: Path, forks: Forks) -> None:
    forks.run(*BASE, LR, "epochs=1", "search.trials=1", cwd=tmp_path)
    for other, cause in (
        (("lr=0.1,0.2",), "holds a search"),
        (("lr=interval(0.1,0.2)", "search.trials=2"), "varies other keys"),
        ((LR, "search.trials=2", "epochs=2"), "another config"),
    ):
        process = forks.start(*BASE, *other, cwd=tmp_path)
        assert process.wait() == 2, process.stderr
        assert cause in process.stderr
    assert len(jobs_of(tmp_path)) == 1


def test_a_job_with_a_damaged_directory_fails_alone(tmp_path: Path, forks: Forks) -> None:
    forks.run(*BASE, LR, "epochs=4", "search.epochs=2", cwd=tmp_path)
    shutil.rmtree(tmp_path / "S/0/.hydra")
    process = forks.start("resume", "S", "search.epochs=6", cwd=tmp_path)
    assert process.wait() == 10, process.stderr
    assert "job 0 cannot be resumed" in process.stderr
    assert [job.status for job in jobs_of(tmp_path)] == ["failed", "completed"]
    assert [trial.state for trial in trials_of(tmp_path)] == [TrialState.FAIL, TrialState.COMPLETE]


def test_two_searches_do_not_mix_in_one_database(tmp_path: Path, forks: Forks) -> None:
    command = (*OPTIONS, LR, "epochs=1", "search.trials=1", f"search.storage='sqlite:///{tmp_path}/studies.db'")
    forks.run(*command, "hydra.sweep.dir=a/sweeps/S", cwd=tmp_path)
    process = forks.start(*command, "hydra.sweep.dir=b/sweeps/S", cwd=tmp_path)
    assert process.wait() == 2, process.stderr
    assert "the study sweeps/S in search.storage belongs to a search in another folder" in process.stderr
    forks.run(*command, "hydra.sweep.dir=a/sweeps/S", cwd=tmp_path)  # the search itself continues

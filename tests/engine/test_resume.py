"""A run that stops anywhere and is resumed ends with the bits of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trainkit
from tests.helpers import read_history
from trainkit import compose
from trainkit.build import session as build
from trainkit.config.settings import read_settings
from trainkit.core.errors import CheckpointError, ConfigError
from trainkit.engine.resume import continue_run
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.recovery import recover_run
from trainkit.runs.reload import reload_config
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS
from trainkit.training.state import State

slow = pytest.mark.slow
MODULE = '''
import random
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    """A model with dropout, batch norm, and a parameter that has no gradient in some steps."""

    def __init__(self, norm=True):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity()
        self.dropout, self.last = nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))))

class Augmented:
    """Samples that use the generators of Python, NumPy and torch."""

    classes = ["a", "b", "c"]

    def __init__(self, size=37, draws=True, tag=None):
        generator = torch.Generator().manual_seed(1)
        self.x, self.draws = torch.randn(size, 8, generator=generator), draws
        self.y = torch.randint(0, 3, (size,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(8) + float(np.random.rand()) + random.random() if self.draws else 0
        return self.x[index] + noise, int(self.y[index])

class Crash(Exception): ...

class CrashAt:
    def __init__(self, step, batch=None):
        self.step = step

    def on_step(self, state):
        if state.progress.step == self.step:
            raise Crash(f"at step {self.step}")

class CrashAfter:
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch(self, state, metrics):
        if state.progress.epoch == self.epoch + 1:
            raise Crash(f"in epoch {self.epoch + 1}")
'''
CONFIGS = {
    "model/net.yaml": "_target_: resumemodule.Net\n",
    "data/augmented.yaml": (
        "train: {_target_: resumemodule.Augmented}\nval: {_target_: resumemodule.Augmented, size: 20}\n"
    ),
}
BASE = ["model=net", "data=augmented", "epochs=3", "batch_size=5", "progress=off", "checkpoint.every_steps=1"]


@pytest.fixture
def own(here: Path) -> Iterator[Path]:
    """Return a folder with a model and a data set; their modules are removed from `sys.modules` afterwards."""
    (here / "resumemodule.py").write_text(MODULE)
    for name, text in CONFIGS.items():
        (here / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "conf" / name).write_text(text)
    yield here
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(here)):
            del sys.modules[name]


def final(run: Run) -> tuple[str, list[dict[str, Any]]]:
    """Return the hash of the final state of a run, and its history without times."""
    _, saved, _ = Checkpoints(run.directory / "checkpoints").newest()
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in run.history]
    return digest(saved), history


def crashed(overrides: list[str], directory: Path, hook: str) -> None:
    """Train until a hook raises an error: for the run this equals the death of its process."""
    with pytest.raises(trainkit.core.errors.UserCodeError, match="Crash"):
        trainkit.train(compose([*overrides, f"+hooks.crash={{_target_: resumemodule.{hook}}}"]), directory=directory)


OPTIMIZERS = (
    ["optim=sgd", "optim.momentum=0.9", "lr=0.05"],
    ["optim=adamw"],
    ["optim=lbfgs", "optim.max_iter=4", "lr=0.1", "+model.norm=false"],
)
SCHEDULERS = ("none", "onecycle", "plateau")
MATRIX = list(itertools.product(OPTIMIZERS, SCHEDULERS, (0, 2), ("mid-epoch", "boundary"), ("off", "0.9")))


def in_the_matrix(case: Any, directory: Path) -> None:
    """Train without and with a crash, and compare."""
    optimizer, scheduler, workers, place, ema = case
    overrides = [
        *BASE,
        *optimizer,
        *(["checkpoint.every_steps=off"] if place == "boundary" else []),
        f"scheduler={scheduler}",
        f"data.num_workers={workers}",
        f"ema={ema}",
        *(["scheduler.patience=0"] if scheduler == "plateau" else []),
    ]
    straight = trainkit.train(compose(overrides), directory=directory / "straight")
    crashed(overrides, directory / "resumed", "CrashAt, step: 12" if place == "mid-epoch" else "CrashAfter, epoch: 1")
    name, saved, _ = Checkpoints(directory / "resumed" / "checkpoints").newest()
    assert (saved["epoch"], saved["batch"]) == ((1, 3) if place == "mid-epoch" else (1, 0)), name
    resumed = trainkit.resume(directory / "resumed", ["~hooks.crash"])
    assert final(resumed) == final(straight)


@pytest.mark.parametrize("case", MATRIX[::13], ids=str)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_run(case: Any, own: Path) -> None:
    in_the_matrix(case, own)


@slow
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_a_resumed_run_ends_with_the_same_bits_for_all_parts(case: Any, own: Path) -> None:
    in_the_matrix(case, own)


def test_a_run_stopped_at_the_end_of_an_epoch_resumes_with_the_next_epoch(own: Path) -> None:
    overrides = [*BASE, "checkpoint.every_steps=off"]
    straight = trainkit.train(compose(overrides), directory=own / "straight")
    crashed(overrides, own / "resumed", "CrashAfter, epoch: 1")
    _, saved, _ = Checkpoints(own / "resumed" / "checkpoints").newest()
    assert (saved["epoch"], saved["batch"]) == (1, 0)
    assert final(trainkit.resume(own / "resumed", ["~hooks.crash"])) == final(straight)


def test_the_number_of_workers_may_change_at_a_resume_and_changes_no_bit(own: Path) -> None:
    straight = trainkit.train(compose(BASE), directory=own / "straight")
    for before, after in ((0, 2), (2, 0)):
        directory = own / f"from {before}"
        crashed([*BASE, f"data.num_workers={before}"], directory, "CrashAt, step: 12")
        resumed = trainkit.resume(directory, ["~hooks.crash", f"data.num_workers={after}"])
        assert final(resumed) == final(straight)


def test_skipped_batches_are_not_read_again(own: Path) -> None:
    (own / "counting.py").write_text(
        "from resumemodule import Augmented\nread = []\nclass Counted(Augmented):\n"
        "    def __getitem__(self, index):\n        read.append(index)\n        return super().__getitem__(index)\n"
    )
    overrides = [*BASE, "data.train._target_=counting.Counted", "data.val=null", "data.cache=none"]
    crashed(overrides, own / "resumed", "CrashAt, step: 14")  # 8 batches per epoch: 5 of the second epoch remain
    import counting  # type: ignore[import-not-found]

    counting.read.clear()
    run = trainkit.resume(own / "resumed", ["~hooks.crash", "epochs=2"])
    assert len({*counting.read}) == 37 - 5 * 5 == run.history[-1]["train/samples"] - 5 * 5
    # A sample is read to find out how the model is called. The first read of each reader is repeated.
    assert len(counting.read) <= 37 - 5 * 5 + 1 + 2


def test_further_hooks_are_called_if_a_resume_changes_the_schedule(own: Path) -> None:
    class Epochs:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_epoch_end(self, state: Any, _: Any) -> None:
            self.seen.append(state.epoch)

    run = trainkit.train(compose([*BASE, "scheduler=cosine", "epochs=1"]), directory=own / "run")
    hook = Epochs()
    continue_run(recover_run(run.directory), reload_config(run, ["epochs=3"]), hooks=[hook])
    assert hook.seen == [2, 3]


def test_a_resume_undoes_what_hooks_do_in_on_start(own: Path) -> None:
    (own / "starthook.py").write_text(
        "import torch\nclass Reset:\n    def on_start(self, state):\n        torch.randn(3)\n"
        "        for p in state.model.parameters():\n            p.data.fill_(0.1)\n"
        "        for content in state.optimizer.state.values():\n            content['momentum_buffer'].zero_()\n"
    )
    overrides = [*BASE, "optim.momentum=0.9", "+hooks.reset._target_=starthook.Reset"]
    straight = trainkit.train(compose(overrides), directory=own / "straight")
    crashed(overrides, own / "resumed", "CrashAt, step: 12")
    assert final(trainkit.resume(own / "resumed", ["~hooks.crash"])) == final(straight)


def test_several_optimizers_and_param_groups_resume_to_the_same_bits(own: Path) -> None:
    overrides = [*BASE, "optim=muon_sgd", "+param_groups.norm={type: BatchNorm1d, weight_decay: 0, lr_mult: 0.5}"]
    overrides += ["scheduler=warmup_cosine", "clip_norm=0.5"]
    straight = trainkit.train(compose(overrides), directory=own / "straight")
    crashed(overrides, own / "resumed", "CrashAt, step: 12")
    assert final(trainkit.resume(own / "resumed", ["~hooks.crash"])) == final(straight)


# ------------------------------------------------------------------------------- what may change, what not


def trained(own: Path, *overrides: str) -> Run:
    """Return a run of three epochs."""
    return trainkit.train(compose([*BASE, "checkpoint.every_steps=off", *overrides]), directory=own / "run")


def test_more_epochs_without_a_scheduler_end_with_the_bits_of_a_run_of_that_length(own: Path) -> None:
    straight = trainkit.train(compose([*BASE, "epochs=5"]), directory=own / "straight")
    run = trained(own)
    assert final(trainkit.resume(run, ["epochs=5"])) == final(straight)
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "scheduler",
    ["onecycle", "warmup_cosine", "step", *(pytest.param(name, marks=slow) for name in ("cosine", "linear"))],
)
def test_with_more_epochs_a_scheduler_continues_as_in_a_run_of_that_length(scheduler: str, own: Path) -> None:
    straight = trainkit.train(compose([*BASE, f"scheduler={scheduler}", "epochs=6"]), directory=own / "straight")
    run = trainkit.resume(trained(own, f"scheduler={scheduler}"), ["epochs=6"])
    rates = [row["lr/default"] for row in straight.history]
    assert [row["lr/default"] for row in run.history[3:]] == rates[3:]
    note = "the scheduler now covers 6 epochs" in (run.directory / "trainkit.log").read_text()
    assert note == (scheduler != "step")  # its steps do not depend on the length of the run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1", ["seed: 0 in the checkpoint, 1 now", "resume.allow=[seed]"]),
        ("batch_size=7", ["batch_size: 5 in the checkpoint, 7 now"]),
        ("lr=0.5", ["lr: 0.01 in the checkpoint, 0.5 now", "resume.allow=[lr]"]),
        ("optim.momentum=0.5", ["optim.momentum: 0 in the checkpoint, 0.5 now"]),
        ("data.train.size=40", ["data.train.size: None in the checkpoint, 40 now"]),
        ("loss.label_smoothing=0.1", ["loss.label_smoothing"]),
        ("clip_norm=1", ["clip_norm: None in the checkpoint, 1 now"]),
        ("ema=0.9", ["ema"]),
    ],
)
def test_a_change_of_the_mathematics_is_refused_with_both_values(override: str, words: list[str], own: Path) -> None:
    run = trained(own)
    before = {file: file.read_bytes() for file in run.directory.rglob("*") if file.is_file()}
    override = f"+{override}" if override.startswith("data.train.size") else override
    with pytest.raises(CheckpointError) as caught:
        trainkit.resume(run, ["epochs=5", override])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert {file: file.read_bytes() for file in run.directory.rglob("*") if file.is_file()} == before


def test_an_allowed_lr_applies_from_the_resume_on(own: Path) -> None:
    run = trainkit.resume(trained(own), ["epochs=5", "lr=0.5", "resume.allow=[lr]"])
    assert [row["lr/default"] for row in run.history] == [0.01] * 3 + [0.5] * 2
    assert trainkit.resume(run, ["epochs=6"]).history[-1]["lr/default"] == 0.5


def test_an_allowed_batch_size_restarts_the_epoch(own: Path) -> None:
    crashed(BASE, own / "run", "CrashAt, step: 12")
    run = trainkit.resume(own / "run", ["~hooks.crash", "batch_size=10", "resume.allow=[batch_size]"])
    assert [row["train/samples"] for row in run.history] == [37, 37, 37]
    assert [row["step"] for row in run.history] == [8, 11 + 4, 11 + 4 + 4]  # saved after 11 steps


def test_another_monitor_resets_the_best_epoch(own: Path) -> None:
    overrides = ["epochs=5", "monitor={metric: val/accuracy, mode: max}", "resume.allow=[monitor]"]
    run = trainkit.resume(trained(own), overrides)
    assert run.best is not None
    assert run.best["metric"] == "val/accuracy"
    assert run.best["epoch"] > 3


def test_a_run_that_stopped_early_continues_with_more_patience(own: Path) -> None:
    run = trained(own, "lr=0", "epochs=9", "early_stop.patience=2")
    assert len(run.history) == 3
    assert len(trainkit.resume(run, ["early_stop.patience=4"]).history) == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim=adam", ["a resumed run keeps its optim"]),
        ("epoch=5", ["the key 'epoch' does not exist", "did you mean epochs?"]),
        ("epochs=-1", ["epochs=-1"]),
        ("resume.allow=[leraning_rate]", ["resume.allow=leraning_rate", "does not exist"]),
        ("seed=1,2", ["it has no meaning for the resume of one run"]),
        ("hydra.run.dir=x", ["it has no meaning for the resume of one run"]),
    ],
)
def test_a_wrong_override_is_a_config_error(override: str, words: list[str], own: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        trainkit.resume(trained(own), [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_allowed_loss_weight_applies_from_the_resume_on(own: Path) -> None:
    run = trained(own, "loss.weight=[1,2,0.5]")
    trainkit.resume(run, ["epochs=4", "loss.weight=[1,50,0.5]", "resume.allow=[loss]"])
    _, saved, _ = Checkpoints(run.directory / "checkpoints").newest()
    assert saved["loss"]["weight"].tolist() == [1, 50, 0.5]


def test_clipping_may_be_switched_off_if_allowed(own: Path) -> None:
    run = trained(own, "clip_norm=0.01")
    assert len(trainkit.resume(run, ["epochs=4", "clip_norm=off", "resume.allow=clip_norm"]).history) == 4


def test_an_allowed_change_stays_allowed_until_a_checkpoint_contains_it(own: Path) -> None:
    run = trained(own)
    (own / "early.py").write_text(
        "from resumemodule import Crash\nclass AtStart:\n    def on_start(self, state):\n        raise Crash\n"
    )
    with pytest.raises(trainkit.core.errors.UserCodeError):
        hook = "+hooks.early._target_=early.AtStart"
        trainkit.resume(run, ["epochs=5", "lr=0.5", "resume.allow=[lr]", hook])
    rows = trainkit.resume(run, ["~hooks.early"]).history
    assert [row["lr/default"] for row in rows] == [0.01] * 3 + [0.5] * 2


def test_a_rollback_after_a_changed_lr_keeps_the_new_lr(own: Path) -> None:
    (own / "poison.py").write_text(
        "from resumemodule import Augmented\nclass Poison(Augmented):\n    def __getitem__(self, index):\n"
        "        x, y = super().__getitem__(index)\n        return (x * float('nan') if index == 3 else x), y\n"
    )
    overrides = ["on_nonfinite=rollback", "data.train._target_=poison.Poison", "scheduler=cosine"]
    run = trainkit.resume(trained(own, *overrides), ["epochs=6"])
    straight = trainkit.train(compose([*BASE, *overrides, "epochs=6"]), directory=own / "straight")
    assert all(row["train/skipped"] == 1 for row in run.history)
    assert [row["lr/default"] for row in run.history[3:]] == [row["lr/default"] for row in straight.history[3:]]


def test_a_second_change_must_be_allowed_again(own: Path) -> None:
    run = trainkit.resume(trained(own), ["epochs=4", "lr=0.5", "resume.allow=[lr]"])
    with pytest.raises(CheckpointError, match=r"lr: 0\.5 in the checkpoint, 0\.9 now"):
        trainkit.resume(run, ["epochs=5", "lr=0.9"])
    hook = "+hooks.crash={_target_: resumemodule.CrashAt, step: 33}"
    with pytest.raises(trainkit.core.errors.UserCodeError):
        trainkit.resume(run, ["epochs=5", "lr=0.7", "resume.allow=[lr]", hook, "checkpoint.every_epochs=9"])
    with pytest.raises(CheckpointError, match=r"lr: 0\.7 in the checkpoint, 0\.9 now"):
        trainkit.resume(run, ["lr=0.9"])


@pytest.mark.parametrize("batches", [[6], pytest.param([1, 2, 3, 4, 5, 7, 8], marks=slow)], ids=str)
def test_a_stop_and_resume_does_not_change_a_rollback(batches: list[int], own: Path) -> None:
    """Signals write unplanned checkpoints; a rollback uses planned ones only."""
    (own / "poison.py").write_text(
        "from resumemodule import Augmented\nclass Poison(Augmented):\n    def __getitem__(self, index):\n"
        "        x, y = super().__getitem__(index)\n        return (x * float('nan') if index in (3, 9) else x), y\n"
        "class Stop:\n    def __init__(self, batch):\n        self.batch = batch\n"
        "    def on_step(self, state):\n        if state.progress.epoch == 1 and state.progress.batch == self.batch:\n"
        "            from trainkit.core.errors import Stopped\n            state.stop = Stopped(15)\n"
    )
    overrides = [*BASE, "checkpoint.every_steps=3", "checkpoint.keep=1", "on_nonfinite=rollback"]
    overrides += ["data.train._target_=poison.Poison"]
    straight = trainkit.train(compose(overrides), directory=own / "straight")
    assert [row["train/skipped"] for row in straight.history] == [2, 2, 2]
    for batch in batches:
        directory = own / f"stopped at {batch}"
        with pytest.raises(trainkit.core.errors.Stopped):
            hook = f"+hooks.stop={{_target_: poison.Stop, batch: {batch}}}"
            trainkit.train(compose([*overrides, hook]), directory=directory)
        assert final(trainkit.resume(directory, ["~hooks.stop"])) == final(straight), batch


def test_checkpoints_of_every_minutes_are_not_planned(own: Path) -> None:
    overrides = ["checkpoint.every_minutes=1e-9", "checkpoint.every_epochs=off", "checkpoint.keep=99", "lr=0.3"]
    run = trained(own, *overrides)
    planned = {}
    for file in (run.directory / "checkpoints").glob("*/manifest.json"):
        planned[file.parent.name] = json.loads(file.read_text())["planned"]
    assert len(planned) == 25
    best = {f"step-{step:08d}" for step in (row["step"] for row in run.history if is_best(row, run.history))}
    assert {name for name, is_planned in planned.items() if is_planned} == {"step-00000000", "step-00000024"} | best


def is_best(row: dict[str, Any], history: list[dict[str, Any]]) -> bool:
    """Return whether the last epoch has the smallest validation loss so far."""
    return all(row["val/loss"] < before["val/loss"] for before in history if before["epoch"] < row["epoch"])


def test_checkpoints_may_be_switched_off_and_on_again(own: Path) -> None:
    (own / "starthook.py").write_text(
        "import torch\nclass Reset:\n    def on_start(self, state):\n        torch.randn(3)\n"
        "        for p in state.model.parameters():\n            p.data.fill_(0.1)\n"
    )
    overrides = [*BASE, "+hooks.reset._target_=starthook.Reset"]
    straight = trainkit.train(compose(overrides), directory=own / "straight")
    crashed(overrides, own / "resumed", "CrashAt, step: 12")
    run = trainkit.resume(own / "resumed", ["~hooks.crash", "checkpoint=off"])
    assert final(run)[1] == final(straight)[1]
    assert len(trainkit.resume(run, ["checkpoint.keep=3", "epochs=4"]).history) == 4


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("+model.tokenizer=wordpiece", True),
        ("+model.keypoints=[1,2]", True),
        ("+model.max_tokens=64", True),
        ("+model.monkey=mean", True),
        ("+model.api_key=mean", False),
    ],
)
def test_ordinary_names_are_not_secrets(override: str, kept: bool, own: Path) -> None:
    (own / "anynet.py").write_text(
        "from resumemodule import Net\nclass AnyNet(Net):\n"
        "    def __init__(self, **rest):\n        super().__init__()\n"
    )
    run = trained(
        own, "model._target_=anynet.AnyNet", override, "+param_groups.key_layers={name: 'last.*', lr_mult: 2}"
    )
    if not kept:
        with pytest.raises(ConfigError, match=r"model\.api_key: the value is a secret"):
            trainkit.resume(run, ["epochs=4"])
        with pytest.raises(ConfigError, match=r"model\.api_key: the value is a secret"):
            trainkit.load(run)
        assert trainkit.load(run, overrides=["model.api_key=mean"]) is not None
    again = [] if kept else ["model.api_key=other"]
    assert len(trainkit.resume(run, ["epochs=4", *again]).history) == 4


def test_a_plateau_resets_its_best_value_for_another_metric(own: Path) -> None:
    run = trained(own, "scheduler=plateau", "scheduler.patience=0", "lr=0")
    changes = ["monitor={metric: val/accuracy, mode: max}", "resume.allow=[monitor,scheduler]"]
    trainkit.resume(run, ["epochs=4", *changes])
    _, saved, _ = Checkpoints(run.directory / "checkpoints").newest()
    assert saved["schedulers"][0]["best"] == run.history[-1]["val/accuracy"]


def test_with_another_batch_size_a_step_scheduler_continues_at_the_same_epoch(own: Path) -> None:
    run = trained(own, "scheduler=onecycle", "epochs=6", "early_stop.patience=1", "lr=0")
    changes = ["batch_size=37", "early_stop.patience=off", "lr=0.01", "resume.allow=[batch_size,scheduler,lr]"]
    done = len(run.history)
    rows = trainkit.resume(run, changes).history
    straight = trainkit.train(compose([*BASE, "scheduler=onecycle", "epochs=6", "batch_size=37"]), directory=own / "s")
    assert [row["lr/default"] for row in rows[done:]] == [row["lr/default"] for row in straight.history[done:]]


# -------------------------------------------------------------------------------------- what is left alone


def test_a_finished_run_is_not_changed(own: Path) -> None:
    run = trained(own)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.directory.rglob("*") if file.is_file()}
    for overrides in ([], ["epochs=3"]):
        assert trainkit.resume(run, overrides).history == run.history
    assert {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in run.directory.rglob("*")
        if file.is_file() and file.name != ".lock"
    } == {file: content for file, content in before.items() if file.name != ".lock"}


def test_run_json_records_each_resume_and_history_lists_each_epoch_once(own: Path) -> None:
    crashed(BASE, own / "run", "CrashAt, step: 12")
    assert json.loads((own / "run" / "run.json").read_text())["status"] == "failed"
    with (own / "run" / "history.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train/loss"')  # a line cut off by a kill
    run = trainkit.resume(own / "run", ["~hooks.crash"])
    info = json.loads((own / "run" / "run.json").read_text())
    assert info["status"] == "completed"
    (resumed,) = info["resumed"]
    assert (resumed["checkpoint"], resumed["step"], resumed["epoch"]) == ("step-00000011", 11, 2)
    assert [row["epoch"] for row in read_history(run.directory)] == [1, 2, 3]


def test_a_resume_finishes_a_run_killed_after_its_last_checkpoint(own: Path) -> None:
    run = trained(own)
    path = run.directory / "run.json"
    path.write_text(path.read_text().replace("completed", "running"))
    history = run.history
    trainkit.resume(run)
    assert json.loads(path.read_text())["status"] == "completed"
    assert run.history == history


def test_a_resume_repairs_pointers_that_a_kill_left_behind(own: Path) -> None:
    run = trained(own, "lr=0.3", "checkpoint.keep=9")
    pointers = {name: (run.directory / "checkpoints" / name).read_text() for name in ("best", "last")}
    for name in pointers:
        (run.directory / "checkpoints" / name).write_text("step-00000000\n")
    path = run.directory / "run.json"
    path.write_text(path.read_text().replace("completed", "running"))
    trainkit.resume(run)
    assert {name: (run.directory / "checkpoints" / name).read_text() for name in pointers} == pointers


def test_skipped_samples_are_counted_over_the_whole_run(own: Path) -> None:
    (own / "torn.py").write_text(
        "from resumemodule import Augmented\nclass Torn(Augmented):\n    def __getitem__(self, index):\n"
        "        if index in (3, 4, 5):\n            raise OSError('torn')\n        return super().__getitem__(index)\n"
    )
    overrides = [*BASE, "data.train._target_=torn.Torn", "data.on_unreadable=skip", "batch_size=10"]
    straight = trainkit.train(compose(overrides), directory=own / "straight")
    assert straight.history[0]["unreadable"] == 3
    crashed(overrides, own / "resumed", "CrashAt, step: 4")
    assert final(trainkit.resume(own / "resumed", ["~hooks.crash"])) == final(straight)


def test_hydra_interpolations_have_their_old_values_at_a_resume(own: Path) -> None:
    composed = trainkit.config.compose.compose_run(
        [*BASE, "optim=adam", "+data.train.tag=${hydra:runtime.choices.optim}"]
    )
    assert composed.settings.data.train["tag"] == "adam"
    run = trainkit.engine.train.train(composed, directory=own / "run")
    assert len(trainkit.resume(run, ["epochs=4"]).history) == 4


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "{}", "[" * 100_000, '{"status": "completed"}', None])
def test_a_damaged_run_json_is_rebuilt_from_the_checkpoint_and_the_run_says_so(
    content: str | None, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(own)
    wanted = json.loads((run.directory / "run.json").read_text())
    (run.directory / "run.json").unlink()
    if content is not None:
        (run.directory / "run.json").write_text(content)
    rebuilt = trainkit.resume(run.directory, ["progress=plain"])
    text = capfd.readouterr().err
    assert "run.json" in text
    assert "it is rebuilt from the checkpoint" in text
    found = json.loads((run.directory / "run.json").read_text())
    for key in (
        "status",
        "exit_code",
        "best",
        "parameters",
        "train_samples",
        "val_samples",
        "device",
        "history_sha256",
    ):
        assert found[key] == wanted[key], key
    assert len(rebuilt.history) == 3
    assert len(trainkit.resume(run.directory, ["epochs=4"]).history) == 4


def test_damaged_files_that_a_resume_does_not_need_are_ignored(own: Path) -> None:
    run = trained(own)
    (run.directory / ".hydra" / "overrides.yaml").write_bytes(b"\xff\x00{")
    with (run.directory / "history.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n" + b'{"epoch": 1}\n{"epoch": -5}\n')
    run = trainkit.resume(run, ["epochs=4"])
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]


def _drop_first(text: str) -> str:
    return text.partition("\n")[2]


def _change_a_digit(text: str) -> str:
    place = text.index('"train/loss": ') + len('"train/loss": ') + 3
    return text[:place] + ("7" if text[place] != "7" else "3") + text[place + 1 :]


HISTORY_DAMAGE: dict[str, Any] = {
    "deleted": None,
    "empty": lambda _: "",
    "a line less": _drop_first,
    "a torn line": lambda text: text.replace('{"epoch": 2', "{torn"),
    "a changed digit": _change_a_digit,
    "lines in another order": lambda text: "".join(reversed(text.splitlines(keepends=True))),
}


@pytest.mark.parametrize("epochs", [[], ["epochs=4"]])
@pytest.mark.parametrize("damage", HISTORY_DAMAGE)
def test_a_damaged_history_is_restored_from_the_checkpoint_and_the_run_says_so(
    damage: str, epochs: list[str], own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(own)
    history, wanted = run.directory / "history.jsonl", (run.directory / "history.jsonl").read_text()
    change = HISTORY_DAMAGE[damage]
    history.unlink() if change is None else history.write_text(change(wanted))
    run = trainkit.resume(run.directory, [*epochs, "progress=plain"])
    assert "history.jsonl is damaged" in capfd.readouterr().err
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4][: 3 + len(epochs)]
    assert history.read_text().startswith(wanted)


def test_a_deleted_history_is_restored_although_the_scheduler_covers_more_epochs(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(own, "scheduler=cosine")
    wanted = (run.directory / "history.jsonl").read_text()
    (run.directory / "history.jsonl").unlink()
    run = trainkit.resume(run.directory, ["epochs=4", "progress=plain"])
    assert "history.jsonl is damaged" in capfd.readouterr().err
    assert (run.directory / "history.jsonl").read_text().startswith(wanted)


def test_fewer_epochs_than_done_are_refused_and_change_nothing(own: Path) -> None:
    run = trained(own)
    before = {file: file.read_bytes() for file in run.directory.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(ConfigError, match="epochs=2: the run has begun epoch 3") as raised:
        trainkit.resume(run, ["epochs=2"])
    assert "epochs=3 or more" in str(raised.value)
    assert {file: file.read_bytes() for file in before} == before
    assert len(trainkit.resume(run, ["epochs=4"]).history) == 4


def test_fewer_epochs_than_begun_are_refused(own: Path) -> None:
    crashed([*BASE, "epochs=9"], own / "run", "CrashAt, step: 12")  # of 8 steps per epoch
    with pytest.raises(ConfigError, match="epochs=1: the run has begun epoch 2"):
        trainkit.resume(own / "run", ["epochs=1", "~hooks.crash"])


def test_a_run_that_an_older_version_continued_with_fewer_epochs_can_be_resumed(own: Path) -> None:
    from tests.runs.test_checkpoint import write_state

    run = trained(own)
    folder = run.directory / "checkpoints" / "step-00000024"
    saved = torch.load(folder / "state.pt", weights_only=True)
    torch.save(saved | {"fingerprint": saved["fingerprint"] | {"epochs": 1}}, own / "state")
    write_state(folder, (own / "state").read_bytes())
    assert len(trainkit.resume(run, ["epochs=5"]).history) == 5


def test_a_damaged_best_checkpoint_is_reported_and_no_longer_the_best(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(own, "checkpoint.keep=9")
    checkpoints = run.directory / "checkpoints"
    best = (checkpoints / "best").read_text().strip()
    state = checkpoints / best / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    trainkit.resume(run, ["epochs=4", "progress=plain"])
    assert f"the weights of the best epoch, {best}, are damaged" in capfd.readouterr().err
    pointer = checkpoints / "best"
    assert not pointer.exists() or pointer.read_text().strip() != best


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": [1]},
        {"fingerprint": {}},
        {"fingerprint": {"config": {"lr": torch.zeros(2)}, "data": {}, "machine": {}, "epochs": 3}},
        {"fingerprint": {"config": {}, "data": {}, "machine": {}, "epochs": "three"}},
        {"best": {"epoch": 1, "step": 8}},
        {"early_stop": 3},
    ],
)
def test_wrong_types_in_a_checkpoint_are_refused_and_change_nothing(change: dict[str, Any], own: Path) -> None:
    from tests.runs.test_checkpoint import write_state

    run = trained(own)
    folder = run.directory / "checkpoints" / "step-00000024"
    saved = torch.load(folder / "state.pt", weights_only=True)
    if "config" in change.get("fingerprint", ()) and change["fingerprint"]["epochs"] == "three":
        change = {"fingerprint": saved["fingerprint"] | {"epochs": "three"}}
    torch.save(saved | change, own / "state")
    write_state(folder, (own / "state").read_bytes())
    info = (run.directory / "run.json").read_text()
    with pytest.raises(CheckpointError):
        trainkit.resume(run, ["epochs=5"])
    assert (run.directory / "run.json").read_text() == info


def test_a_tensor_metric_is_stored_as_a_number_and_an_unstorable_metric_is_an_error(own: Path) -> None:
    (own / "adding.py").write_text(
        "import torch\nclass Add:\n    def __init__(self, odd=False):\n        self.odd = odd\n"
        "    def on_epoch(self, state, metrics):\n        metrics['mine'] = torch.tensor(1.5)\n"
        "        if self.odd:\n            metrics['odd'] = object()\n"
    )
    run = trained(own, "+hooks.add={_target_: adding.Add}")
    assert run.history[0]["mine"] == 1.5
    with pytest.raises(ConfigError, match="the metric odd is an object"):
        trainkit.train(compose([*BASE, "+hooks.add={_target_: adding.Add, odd: true}"]), directory=own / "odd")


def test_a_run_without_checkpoints_is_not_restarted_silently(own: Path) -> None:
    run = trained(own, "checkpoint=off")
    with pytest.raises(CheckpointError, match="it holds no checkpoint"):
        trainkit.resume(run, ["epochs=5"])
    assert len(run.history) == 3
    assert not (run.directory / "checkpoints").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_says_so(own: Path) -> None:
    straight = trained(own)
    shutil.copytree(straight.directory, own / "early")
    shutil.rmtree(own / "early" / "checkpoints")
    (own / "early" / "history.jsonl").unlink()
    info = json.loads((own / "early" / "run.json").read_text())
    (own / "early" / "run.json").write_text(json.dumps(info | {"status": "running"}))
    run = trainkit.resume(own / "early")
    assert "resumed from the beginning" in (own / "early" / "trainkit.log").read_text()
    assert final(run) == final(straight)


def test_another_machine_is_reported_as_equal_up_to_rounding(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(own)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    trainkit.resume(run, ["epochs=4", "micro_batch=3"])
    log = (run.directory / "trainkit.log").read_text()
    assert "note: threads was 1, and is 7: equal only up to rounding" in log
    assert "note: micro_batch was None, and is 3: equal only up to rounding" in log


@pytest.mark.parametrize("name", ["nowhere", "last", "."])
def test_a_directory_that_is_not_a_run_is_a_config_error(name: str, own: Path) -> None:  # noqa: ARG001
    with pytest.raises(ConfigError):
        trainkit.resume(name)


def test_resuming_a_sweep_lists_its_unfinished_runs(own: Path) -> None:
    for number in range(2):
        trainkit.train(compose(BASE), directory=own / "sweep" / str(number))
    path = own / "sweep" / "1" / "run.json"
    path.write_text(path.read_text().replace("completed", "stopped"))
    with pytest.raises(ConfigError, match="1 unfinished") as caught:
        trainkit.resume("sweep")
    assert "trainkit resume sweep/1" in str(caught.value)


# --------------------------------------------------------------------------------------------- the model


def test_load_returns_the_model_with_the_best_weights_in_evaluation_mode(own: Path) -> None:
    class Keep:
        def __init__(self) -> None:
            self.weights: dict[str, torch.Tensor] = {}

        def on_epoch_end(self, state: State, metrics: dict[str, Any]) -> None:
            if state.progress.best is not None and state.progress.best["epoch"] == metrics["epoch"]:
                model, _ = state.objects.evaluated
                self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    for ema in ("off", "0.9"):
        keep = Keep()
        config = compose([*BASE, "lr=0.3", f"ema={ema}", "optim.momentum=0.9"])
        session = build.build_session(read_settings(config))
        trainkit.training.loop.fit(session.state, session.train, session.val, [keep])
        run = trainkit.train(config, directory=own / f"ema {ema}")
        model = trainkit.load(run.directory)
        assert not model.training
        loaded = model.state_dict()
        assert loaded.keys() == keep.weights.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in keep.weights.items())


def test_load_needs_neither_the_data_nor_the_classes_in_the_config(own: Path) -> None:
    run = trainkit.train(compose(["model=mlp", "epochs=1", "limit_batches=2", "progress=off"]), directory=own / "run")
    (own / "conf" / "data" / "augmented.yaml").unlink()
    assert trainkit.load(run)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert trainkit.load(run, checkpoint="last") is not None
    for wrong in ("newest", "step-x", "step-00000002\n"):
        with pytest.raises(ConfigError, match="best, last or step-N"):
            trainkit.load(run, checkpoint=wrong)
    with pytest.raises(CheckpointError, match="no step-7 checkpoint") as error:
        trainkit.load(run, checkpoint="step-7")
    assert error.value.problems[0].hint == "it has step-2, step-0"
    first, last = (trainkit.load(run, checkpoint=name).state_dict() for name in ("step-0", "step-2"))
    assert all(torch.equal(last[name], tensor) for name, tensor in trainkit.load(run, "last").state_dict().items())
    assert not all(torch.equal(last[name], tensor) for name, tensor in first.items())
    (run.directory / "checkpoints" / "best").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        trainkit.load(run)

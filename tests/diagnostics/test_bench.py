"""`trainkit bench`: where a step's time goes, and what it is compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import compose_settings
from trainkit.build import session as build
from trainkit.diagnostics import bench
from trainkit.diagnostics.bench import PHASES, LimitedLoader
from trainkit.display.text import PHASES as WORDS

SLOW = """
import time
import torch

class Slow:
    classes = ["a", "b"]
    def __len__(self):
        return 64
    def __getitem__(self, index):
        time.sleep(0.005)
        return torch.full((3, 8, 8), index / 64), index % 2
"""


def benched(*overrides: str, steps: int = 3) -> dict[str, Any]:
    settings = compose_settings(list(overrides))
    return bench.bench(build.build_session(settings, lambda *_: None), settings, steps)


def test_the_command_tells_each_phase_the_pace_and_the_loop_by_hand(forked: Any) -> None:
    done = forked("bench", "model=mlp", "--steps", "5")
    assert done.returncode == 0, done.stderr
    for word in (*PHASES, "by hand", "bare", "trainkit", "training data: 1,797 samples, in memory", "to change:"):
        assert word in done.stdout
    assert done.stderr == ""


def test_the_answer_as_json_is_the_same_in_numbers(forked: Any) -> None:
    found = json.loads(forked("bench", "model=mlp", "--steps", "5", "--json").stdout)
    assert set(found["phases"]) == set(PHASES) == set(WORDS)
    assert found["samples_per_second"] == pytest.approx(found["batch_size"] / found["step"])
    assert found["peak_share"] == pytest.approx(found["flops"] / found["step"] / found["limits"]["fp32"])
    assert 0 < found["batch_size"] <= 32


def test_it_leaves_no_run_behind(forked: Any, here: Path) -> None:
    assert forked("bench", "model=mlp", "--steps", "2").returncode == 0
    assert not (here / "outputs").exists()


def test_a_slow_data_set_is_told_to_be_the_bound_and_how_to_hold_it(here: Path) -> None:
    (here / "slowmodule.py").write_text(SLOW)
    (here / "conf/data").mkdir(parents=True)
    (here / "conf/data/slow.yaml").write_text("train: {_target_: slowmodule.Slow}\n")
    chosen = ["model=mlp", "data=slow", "batch_size=8"]
    sys.path.insert(0, str(here))
    try:
        streamed = benched(*chosen, "data.cache=none", steps=5)
        held = benched(*chosen, "data.cache=memory", steps=5)
    finally:
        sys.path.remove(str(here))
        sys.modules.pop("slowmodule", None)
    assert streamed["phases"]["loader"] > 8 * 0.005
    assert "the loader is the bound" in streamed["advice"][0]
    assert "data.cache=auto" in streamed["advice"][0]
    assert held["phases"]["loader"] < 0.005
    assert not any("the loader is the bound" in words for words in held["advice"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=lbfgs"],
        ["precision=fp16"],
        ["precision=bf16"],
        ["micro_batch=8"],
        ["ema=0.9", "clip_norm=1"],
        ["optim=muon_sgd", "scheduler=onecycle"],
        ["optim.foreach=true"],
    ],
)
def test_every_kind_of_step_is_measured(overrides: list[str]) -> None:
    found = benched("model=mlp", "model.hidden=[8]", *[o if "foreach" not in o else "+" + o for o in overrides])
    assert all(seconds >= 0 for seconds in found["phases"].values())
    assert found["by_hand"] > 0
    own_way = {"optim=lbfgs", "precision=fp16", "micro_batch=8"} & set(overrides)
    assert (found["bare"] is None) == bool(own_way)


def test_operations_are_counted_as_the_arithmetic_says() -> None:
    session = build.build_session(compose_settings(["model=mlp", "model.hidden=[8]", "data.split=off"]))
    # Two matrices, forward: 2 m n k each; backward: as much for the weights, and for the inputs of all but the first.
    first, second = 2 * 32 * 3072 * 8, 2 * 32 * 8 * 10
    assert bench.flops(session.state, LimitedLoader(session.train, 1)) == 2 * first + 3 * second


def test_a_few_batches_go_on_where_the_last_few_ended_and_begin_again_at_the_end() -> None:
    session = build.build_session(compose_settings(["data=line", "model=linear", "loss=mse", "batch_size=2"]))
    few = LimitedLoader(session.train, 2)
    seen = [inputs for _ in range(3) for inputs, _ in few.batches()]
    wanted = [inputs for epoch in range(2) for inputs, _ in session.train.batches(epoch)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen, wanted, strict=True))


def test_a_model_that_fails_is_blamed_as_in_training(forked: Any) -> None:
    done = forked("bench", "model=linear", "--steps", "2")
    assert done.returncode == 2
    assert "model" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_without_compiling_never_imports_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "lookmodule.py").write_text(
        "import sys\nclass Look:\n    def on_end(self, state):\n"
        "        print('compiler:', [n for n in sys.modules if n.startswith(('torch._dynamo.', 'torch._inductor'))])\n"
        "        print('torchvision' in sys.modules, 'matplotlib' in sys.modules, 'sympy' in sys.modules)\n"
    )
    argv = ["model=mlp", "epochs=2", "limit_batches=2", "optim=adamw", "scheduler=onecycle", "ema=0.9"]
    done = subprocess.run(
        [sys.executable, "-m", "trainkit", *argv, "+hooks.look._target_=lookmodule.Look"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "compiler: []" in done.stdout
    assert "False False False" in done.stdout


def test_bare_and_whole_loop_make_the_same_updates() -> None:
    weights = []
    for loop in (bench.whole_loop, bench.bare_loop):
        session = build.build_session(compose_settings(["model=mlp", "data.split=off"]))
        loop(session.state, LimitedLoader(session.train, 5))
        weights.append(nn.utils.parameters_to_vector(session.state.objects.model.parameters()))
    assert torch.equal(*weights)


def test_a_schedule_shorter_than_what_is_timed_and_a_loss_that_runs_away_are_told_apart(forked: Any) -> None:
    short = forked("bench", "model=mlp", "scheduler=onecycle", "epochs=1", "limit_batches=2", "--steps", "10")
    assert short.returncode == 0, short.stderr
    away = forked("bench", "model=mlp", "lr=1e30", "on_nonfinite=skip", "--steps", "10")
    assert away.returncode == 4
    assert "not finite" in away.stderr


@pytest.mark.parametrize("command", [["find-lr", "--steps", "10"], ["inspect"], ["bench", "--steps", "5"]], ids=str)
def test_commands_that_look_end_with_the_processes_that_read(command: list[str], here: Path) -> None:
    (here / "slowmodule.py").write_text(SLOW)
    (here / "conf/data").mkdir(parents=True)
    (here / "conf/data/slow.yaml").write_text("train: {_target_: slowmodule.Slow}\n")
    chosen = ["model=mlp", "data=slow", "batch_size=8", "data.num_workers=2", "data.cache=none", "progress=off"]
    argv = [sys.executable, "-m", "trainkit", *command, *chosen]
    done = subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

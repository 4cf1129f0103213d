"""`trainkit bench`: the phases of a step, the loops that it is compared with, and the findings."""

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
from trainkit.cli.commands.bench import PHASES as DESCRIBED_PHASES
from trainkit.diagnostics import bench
from trainkit.diagnostics.batches import FixedStepsLoader
from trainkit.diagnostics.phases import PHASES, run_trainkit_loop, time_phases

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


def measure(*overrides: str, steps: int = 3) -> dict[str, Any]:
    settings = compose_settings(list(overrides))
    return bench.bench(build.build_session(settings, lambda *_: None), settings, steps)


def test_bench_prints_phases_and_loops_and_names_no_setting_that_it_did_not_try(forked: Any) -> None:
    done = forked("bench", "model=mlp", "--steps", "5")
    assert done.returncode == 0, done.stderr
    for word in (*PHASES, "by hand", "bare", "trainkit", "training data: 1,797 samples, in memory", "bench --try"):
        assert word in done.stdout
    assert not any(key in done.stdout for key in ("precision=", "compile=", "cache=", "num_workers="))
    assert done.stderr == ""


def test_bench_json_has_consistent_numbers(forked: Any) -> None:
    found = json.loads(forked("bench", "model=mlp", "--steps", "5", "--json").stdout)
    assert set(found["phases"]) == set(PHASES) == set(DESCRIBED_PHASES)
    assert found["samples_per_second"] == pytest.approx(found["batch_size"] / found["step"])
    assert found["peak_share"] == pytest.approx(found["flops"] / found["step"] / found["limits"]["fp32"])
    assert 0 < found["batch_size"] <= 32


def test_bench_creates_no_run_directory(forked: Any, here: Path) -> None:
    assert forked("bench", "model=mlp", "--steps", "2").returncode == 0
    assert not (here / "outputs").exists()


def test_bench_says_that_reading_limits_the_speed_and_why_samples_are_read(here: Path) -> None:
    (here / "slowmodule.py").write_text(SLOW)
    (here / "conf/data").mkdir(parents=True)
    (here / "conf/data/slow.yaml").write_text("train: {_target_: slowmodule.Slow}\n")
    chosen = ["model=mlp", "data=slow", "batch_size=8"]
    sys.path.insert(0, str(here))
    try:
        streamed = measure(*chosen, "data.cache=none", steps=5)
        cached = measure(*chosen, "data.cache=memory", steps=5)
    finally:
        sys.path.remove(str(here))
        sys.modules.pop("slowmodule", None)
    assert streamed["phases"]["loader"] > 8 * 0.005
    assert streamed["findings"][0].startswith("reading data takes ")
    assert streamed["findings"][0].endswith("streamed by the main process: data.cache=none")
    assert cached["phases"]["loader"] < 0.005
    assert not any("reading data" in text for text in cached["findings"])


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
def test_bench_measures_every_kind_of_step(overrides: list[str]) -> None:
    found = measure("model=mlp", "model.hidden=[8]", *[o if "foreach" not in o else "+" + o for o in overrides])
    assert all(seconds >= 0 for seconds in found["phases"].values())
    assert found["by_hand"] > 0
    without_bare_loop = {"optim=lbfgs", "precision=fp16", "micro_batch=8"} & set(overrides)
    assert (found["bare"] is None) == bool(without_bare_loop)


def test_flops_of_a_step_match_the_formula() -> None:
    session = build.build_session(compose_settings(["model=mlp", "model.hidden=[8]", "data.split=off"]))
    # Forward: 2 m n k for each of two matrices. Backward: the same for the weights, and for the inputs of the second.
    first, second = 2 * 32 * 3072 * 8, 2 * 32 * 8 * 10
    assert bench.count_flops(session.state, FixedStepsLoader(session.train, 1)) == 2 * first + 3 * second


def test_a_fixed_steps_loader_continues_and_starts_the_next_epoch_at_the_end_of_the_data() -> None:
    session = build.build_session(compose_settings(["data=line", "model=linear", "loss=mse", "batch_size=2"]))
    loader = FixedStepsLoader(session.train, 2)
    seen = [inputs for _ in range(3) for inputs, _ in loader.batches()]
    expected = [inputs for epoch in range(2) for inputs, _ in session.train.batches(epoch)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_bench_reports_an_error_of_the_model_like_a_training(forked: Any) -> None:
    done = forked("bench", "model=linear", "--steps", "2")
    assert done.returncode == 2
    assert "model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_training_without_compile_does_not_import_the_compiler(tmp_path: Path) -> None:
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


def test_the_bare_loop_makes_the_same_updates_as_trainkit() -> None:
    weights = []
    for loop in (run_trainkit_loop, bench.run_bare_loop):
        session = build.build_session(compose_settings(["model=mlp", "data.split=off"]))
        loop(session.state, FixedStepsLoader(session.train, 5))
        weights.append(nn.utils.parameters_to_vector(session.state.objects.model.parameters()))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "overrides", [[], ["optim=lbfgs"], ["precision=fp16"], ["micro_batch=8"], ["ema=0.9"]], ids=str
)
def test_timing_the_phases_makes_the_same_updates_and_leaves_no_trace(overrides: list[str]) -> None:
    weights = []
    for run in (run_trainkit_loop, time_phases):
        session = build.build_session(compose_settings(["model=mlp", "data.split=off", *overrides]))
        objects = session.state.objects
        before = objects.model, session.train.prepare, torch.Tensor.backward
        seconds = run(session.state, FixedStepsLoader(session.train, 3))
        assert before == (objects.model, session.train.prepare, torch.Tensor.backward)
        assert not objects.loss_fn._forward_hooks
        weights.append(nn.utils.parameters_to_vector(objects.model.parameters()))
    assert torch.equal(*weights)
    assert isinstance(seconds, dict)
    assert all(seconds[phase] > 0 for phase in PHASES)


def test_bench_ignores_the_scheduler_and_stops_at_a_non_finite_loss(forked: Any) -> None:
    short = forked("bench", "model=mlp", "scheduler=onecycle", "epochs=1", "limit_batches=2", "--steps", "10")
    assert short.returncode == 0, short.stderr
    diverged = forked("bench", "model=mlp", "lr=1e30", "on_nonfinite=skip", "--steps", "10")
    assert diverged.returncode == 4
    assert "not finite" in diverged.stderr


@pytest.mark.parametrize("command", [["find-lr", "--steps", "10"], ["inspect"], ["bench", "--steps", "5"]], ids=str)
def test_diagnostic_commands_end_their_worker_processes(command: list[str], here: Path) -> None:
    (here / "slowmodule.py").write_text(SLOW)
    (here / "conf/data").mkdir(parents=True)
    (here / "conf/data/slow.yaml").write_text("train: {_target_: slowmodule.Slow}\n")
    chosen = ["model=mlp", "data=slow", "batch_size=8", "data.num_workers=2", "data.cache=none", "progress=off"]
    argv = [sys.executable, "-m", "trainkit", *command, *chosen]
    done = subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

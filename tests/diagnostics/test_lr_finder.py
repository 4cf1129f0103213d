"""`trainkit find-lr`: the learning-rate range test."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Command
from tests.helpers import compose_settings
from trainkit.build import session as build
from trainkit.config.compose import compose_sweep
from trainkit.diagnostics.lr_finder import RangeTest, range_test


def test_find_lr_suggests_a_usable_rate_and_plots_the_curve(trainkit: Command, tmp_path: Path) -> None:
    done = trainkit("find-lr", "optim=adam", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 1e-4 < result["suggestion"] < 1e-2
    assert result["groups"] == {"default": result["suggestion"]}
    assert (tmp_path / result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / result["picture"]).with_suffix(".json").read_text()) == result
    assert result["rates"][0] == 1e-7
    assert len(result["rates"]) == len(result["losses"]) == len(result["smoothed"])
    assert not (tmp_path / "outputs/latest").exists()


def test_range_test_raises_the_rate_by_a_constant_factor_and_keeps_the_groups_ratios() -> None:
    seen: list[list[float]] = []

    class Rates:
        def on_step(self, state: Any) -> None:
            seen.append([group["lr"] for group in state.objects.optimizer.param_groups])

    settings = compose_settings(["param_groups=head_lr", "lr=0.02"])
    session = build.build_session(settings)
    test = range_test(session.state, session.train, settings.lr, 1e-6, 1e-2, 50, [Rates()])
    assert len(seen) == 50
    assert [rest for _, rest in seen] == pytest.approx(test.rates)
    assert test.rates == pytest.approx(torch.logspace(-6, -2, 50, dtype=torch.float64).tolist())
    assert all(head == pytest.approx(10 * rest) for head, rest in seen)


def test_range_test_without_lr_uses_the_default_of_the_first_optimizer() -> None:
    settings = compose_settings(["optim=sgd", "param_groups=head_lr"])
    session = build.build_session(settings)
    test = range_test(session.state, session.train, None, 1e-6, 1e-2, 10)
    assert test.ratios == pytest.approx({"head": 10.0, "default": 1.0})


def test_the_suggestion_is_at_the_steepest_descent() -> None:
    rates = [10 ** (step / 20 - 6) for step in range(100)]
    falling = [2 - math.tanh((math.log10(rate) + 3) * 2) for rate in rates]  # steepest at 1e-3
    rising = [math.exp(40 * (math.log10(rate) + 2)) if rate > 1e-2 else 0.0 for rate in rates]
    test = RangeTest({"default": 1.0}, 2.0, rates, [a + b for a, b in zip(falling, rising, strict=True)])
    assert test.suggestion() == pytest.approx(1e-3, rel=0.2)
    assert RangeTest({}, 1.0, rates, [1.0 + step for step in range(100)]).suggestion() is None


def test_find_lr_reports_that_no_rate_decreases_the_loss(forked: Command) -> None:
    done = forked("find-lr", "--start", "5", "--end", "50", "--steps", "10", "experiment=line_fit")
    assert done.returncode == 0, done.stderr
    assert "no suggestion" in done.stdout
    assert "then the loss diverged" in done.stdout


def test_noise_gives_no_suggestion() -> None:
    rates = [10 ** (step / 20 - 6) for step in range(100)]
    for seed in range(20):
        noise = (2.3 + 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(seed))).tolist()
        assert RangeTest({}, 3.0, rates, noise).suggestion() is None
        fall = [loss - 0.4 * (1 + math.tanh(2 * (math.log10(r) + 3))) for loss, r in zip(noise, rates, strict=True)]
        assert RangeTest({}, 3.0, rates, fall).suggestion() == pytest.approx(1e-3, rel=2)


def test_find_lr_writes_into_the_given_directory_and_never_overwrites_a_result(forked: Command) -> None:
    argv = ["find-lr", "experiment=line_fit", "--steps", "10", "hydra.run.dir=here"]
    assert forked(*argv, MPLBACKEND="module://nowhere").returncode == 0
    again = forked(*argv)
    assert again.returncode == 7
    assert "here holds a run already: it contains find_lr.json" in again.stderr


def test_the_command_ends_with_a_search_around_the_suggestion(trainkit: Command) -> None:
    done = trainkit("find-lr", "model=mlp", "optim=adam", "--steps", "60", "lr=0.5")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    command = shlex.split(line.removeprefix("to search around it: "))
    assert command[:4] == ["trainkit", "-m", "model=mlp", "optim=adam"]
    checked = compose_sweep(command[2:])
    assert checked.space is not None
    (axis,) = checked.space.axes
    assert (axis.name, axis.log) == ("lr", True)
    suggested = float(done.stdout.partition("fastest at lr=")[2].split()[0])
    assert axis.low < suggested < axis.high

"""`trainkit inspect`: the values of one training step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.conftest import Command
from tests.helpers import compose_settings
from trainkit.build import session as build
from trainkit.diagnostics.inspect import inspect_step


def rows_of(*overrides: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    step = inspect_step(build.build_session(compose_settings(list(overrides))))
    return step, {row["name"]: row for row in step["parameters"]}


@pytest.mark.parametrize("init", [-0.8820, -0.8819625])
def test_inspect_shows_each_gradient_and_the_update_of_a_line_fit(forked: Command, init: float) -> None:
    argv = ["inspect", "experiment=line_fit", f"model.init={init}"]
    (row,) = json.loads(forked(*argv, "--json").stdout)["parameters"]
    gradient = 2 * 2 * (2 * init - 10)  # of (2w - 10)²
    assert row["weight"] == pytest.approx(init)
    assert row["grad_before"] is None
    assert row["grad"] == pytest.approx(gradient, rel=1e-6)
    assert row["grad_twice"] == 2 * row["grad"]
    assert row["grad_after_zero"] is None
    assert row["finite_difference"] == pytest.approx(gradient, rel=1e-7)
    assert row["update"] == pytest.approx(-0.1 * gradient, rel=1e-6)
    assert row["weight_after"] == pytest.approx(init - 0.1 * gradient, rel=1e-6)
    text = forked(*argv).stdout
    assert f"{gradient:.4f}" in text
    assert f"{2 * gradient:.4f}" in text


def test_inspect_shows_the_analytic_gradients_of_a_polynomial() -> None:
    _, rows = rows_of("experiment=polynomial")
    x, y, z = (rows[name]["weight"] for name in "xyz")
    assert x is not None
    for name, expected in {"x": 1, "y": 2 * y, "z": 3 * z**2}.items():
        assert rows[name]["grad"] == pytest.approx(expected, rel=1e-6)
        assert rows[name]["finite_difference"] == pytest.approx(expected, rel=1e-4)


def test_inspect_shows_the_norms_of_the_first_training_step(here: Path) -> None:  # noqa: ARG001
    overrides = ["optim.momentum=0.9", "clip_norm=0.05", "param_groups=head_lr"]
    step, rows = rows_of(*overrides)
    session = build.build_session(compose_settings(overrides))
    model = session.state.objects.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, targets = next(session.train.batches(0))
    loss = nn.CrossEntropyLoss()(model(inputs), targets)
    loss.backward()
    assert step["loss"] == loss.item()
    assert step["samples"] == 32
    for name, p in model.named_parameters():
        assert rows[name]["grad"] == pytest.approx(p.grad.norm().item(), rel=1e-6)
        assert rows[name]["grad_twice"] == pytest.approx(2 * p.grad.norm().item(), rel=1e-6)
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    session.state.objects.optimizer.step()
    for name, p in model.named_parameters():
        change = (p.detach() - before[name]).norm().item()
        assert rows[name]["update"] == pytest.approx(change, rel=1e-5)
        assert rows[name]["relative_update"] == pytest.approx(change / before[name].norm().item(), rel=1e-5)


MODELS = """
import torch
from torch import nn

class Odd(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(10))
        self.unused = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.still = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        print("forward")
        if len(x) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x) * self.scale * self.still
"""


def test_inspect_shows_no_finite_difference_if_the_float64_model_draws_other_numbers(here: Path) -> None:
    (here / "drawmodels.py").write_text(
        "import torch\nfrom torch import nn\nclass Draws(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x):\n        return self.w * x + torch.rand_like(x)\n"
    )
    line = ["data=line", "loss=mse", "~model", "+model._target_=drawmodels.Draws"]
    _, rows = rows_of(*line)
    assert rows["w"]["grad"] is not None
    assert rows["w"]["finite_difference"] is None


def test_inspect_supports_dropout_little_memory_prints_and_frozen_or_unused_parameters(
    trainkit: Command, tmp_path: Path
) -> None:
    (tmp_path / "oddmodels.py").write_text(MODELS)
    argv = ["inspect", "~model", "+model._target_=oddmodels.Odd"]
    done = trainkit(*argv, "--json")
    step = json.loads(done.stdout)
    assert "forward" in done.stderr
    rows = {row["name"]: row for row in step["parameters"]}
    assert rows["unused"]["grad"] is None
    assert rows["unused"]["update"] == 0
    assert rows["still"]["grad"] is None
    assert rows["still"]["finite_difference"] is None
    assert rows["scale"]["grad"] == pytest.approx(rows["scale"]["finite_difference"], rel=1e-4)
    assert "the loss does not depend on unused" in trainkit(*argv).stdout

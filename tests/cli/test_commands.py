"""`params`, `inspect` and `find-lr`, through the installed command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Command
from tests.helpers import compose_settings
from trainkit.build import session as build
from trainkit.diagnostics.inspect import inspect_step
from trainkit.diagnostics.lr_finder import RangeTest, range_test

RESNET = """
_target_: torchvision.models.resnet18
num_classes: ${data.classes}
"""


# ------------------------------------------------------------------------------------------- params


def test_no_decay_leaves_every_norm_and_bias_of_a_resnet_undecayed_and_decays_the_rest(
    trainkit: Command, tmp_path: Path
) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/resnet.yaml").write_text(RESNET)
    done = trainkit("params", "model=resnet", "optim=adamw", "param_groups=no_decay", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}

    from torchvision.models import resnet18

    wanted = {}
    for path, module in resnet18(num_classes=10).named_modules():
        for name, param in module.named_parameters(recurse=False):
            undecayed = isinstance(module, nn.BatchNorm2d) or name == "bias"
            wanted[f"{path}.{name}"] = (0 if undecayed else 0.01, list(param.shape))
    assert {name: (row["options"]["weight_decay"], row["shape"]) for name, row in rows.items()} == wanted
    assert rows["bn1.weight"]["decided_by"]["weight_decay"] == "norms"
    assert rows["fc.bias"]["decided_by"]["weight_decay"] == "biases"
    assert rows["fc.weight"]["decided_by"]["weight_decay"] == "default"
    keys = {"name", "shape", "count", "group", "optimizer", "options", "decided_by", "trainable"}
    assert all(keys <= row.keys() for row in rows.values())


def test_params_shows_a_table_and_trains_nothing(trainkit: Command, tmp_path: Path) -> None:
    done = trainkit("params", "param_groups=head_lr", "+param_groups.stem={module: conv1, freeze: true}")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["fc2.weight"].split()[1:] == ["10x64", "640", "4", "head", "SGD", "0.1", "(head)", "0"]
    assert "frozen (stem)" in lines["conv1.bias"]
    assert "10 tensors, 145,578 parameters, 143,146 of them trainable" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_run_prints_its_groups_and_keeps_the_whole_table(forked: Command, tmp_path: Path) -> None:
    overrides = ["param_groups=head_lr", "optim=muon_sgd"]
    done = forked("train", *overrides, "epochs=1", "limit_batches=1", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    shown = [line.split()[:6] for line in done.stderr.splitlines() if line.startswith(("matrices", "head", "default"))]
    assert shown == [
        ["matrices", "1", "65,536", "muon", "0.01", "0.1"],
        ["matrices+head", "1", "640", "muon", "0.1", "0.1"],
        ["head", "1", "10", "sgd", "0.1", "0"],
        ["default", "7", "79,392", "sgd", "0.01", "0"],
    ]
    shown_by_command = json.loads(forked("params", *overrides, "--json").stdout)
    assert json.loads((tmp_path / "run/params.json").read_text()) == shown_by_command


def test_all_wrong_rules_are_told_by_params_with_exit_code_2(forked: Command) -> None:
    done = forked("params", "+param_groups.a={module: fc9, lr: 1}", "+param_groups.b={type: Conv9, lr: 1}")
    assert done.returncode == 2
    assert "param_groups.a" in done.stderr
    assert "param_groups.b" in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["params", "-m", "seed=0,1"], "one config"),
        (["inspect", "--jsn"], "did you mean --json?"),
        (["find-lr", "--steps", "x"], "--steps"),
        (["find-lr", "--start", "1", "--end", "0.1"], "below --end"),
        (["find_lr"], "did you mean trainkit find-lr?"),
        (["params", "optim=sgdd"], "did you mean optim=sgd?"),
    ],
)
def test_a_wrong_command_line_is_told_at_once(argv: list[str], words: str, forked: Command) -> None:
    done = forked(*argv)
    assert done.returncode == 2
    assert words in done.stderr


# ------------------------------------------------------------------------------------------ inspect


def rows_of(*overrides: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    step = inspect_step(build.build_session(compose_settings(list(overrides))))
    return step, {row["name"]: row for row in step["parameters"]}


@pytest.mark.parametrize("init", [-0.8820, -0.8819625])
def test_inspect_takes_the_line_apart(forked: Command, init: float) -> None:
    asked = ["inspect", "experiment=line_fit", f"model.init={init}"]
    (row,) = json.loads(forked(*asked, "--json").stdout)["parameters"]
    gradient = 2 * 2 * (2 * init - 10)  # of (2w - 10)²
    assert row["weight"] == pytest.approx(init)
    assert row["grad_before"] is None
    assert row["grad"] == pytest.approx(gradient, rel=1e-6)
    assert row["grad_twice"] == 2 * row["grad"]
    assert row["grad_after_zero"] is None
    assert row["finite_difference"] == pytest.approx(gradient, rel=1e-7)
    assert row["update"] == pytest.approx(-0.1 * gradient, rel=1e-6)
    assert row["weight_after"] == pytest.approx(init - 0.1 * gradient, rel=1e-6)
    text = forked(*asked).stdout
    assert f"{gradient:.4f}" in text
    assert f"{2 * gradient:.4f}" in text


def test_the_polynomials_gradients_are_those_of_the_formula() -> None:
    _, rows = rows_of("experiment=polynomial")
    x, y, z = (rows[name]["weight"] for name in "xyz")
    assert x is not None
    for name, wanted in {"x": 1, "y": 2 * y, "z": 3 * z**2}.items():
        assert rows[name]["grad"] == pytest.approx(wanted, rel=1e-6)
        assert rows[name]["finite_difference"] == pytest.approx(wanted, rel=1e-4)


def test_inspect_shows_the_norms_of_the_first_step_of_the_training(here: Path) -> None:  # noqa: ARG001
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


def test_a_finite_difference_of_other_random_draws_is_not_shown(here: Path) -> None:
    (here / "drawmodels.py").write_text(
        "import torch\nfrom torch import nn\nclass Draws(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x):\n        return self.w * x + torch.rand_like(x)\n"
    )
    line = ["data=line", "loss=mse", "~model", "+model._target_=drawmodels.Draws"]
    _, rows = rows_of(*line)
    assert rows["w"]["grad"] is not None
    assert rows["w"]["finite_difference"] is None


def test_inspect_copes_with_dropout_little_memory_prints_frozen_and_unused_parameters(
    trainkit: Command, tmp_path: Path
) -> None:
    (tmp_path / "oddmodels.py").write_text(MODELS)
    asked = ["inspect", "~model", "+model._target_=oddmodels.Odd"]
    done = trainkit(*asked, "--json")
    step = json.loads(done.stdout)
    assert "forward" in done.stderr
    rows = {row["name"]: row for row in step["parameters"]}
    assert rows["unused"]["grad"] is None
    assert rows["unused"]["update"] == 0
    assert rows["still"]["grad"] is None
    assert rows["still"]["finite_difference"] is None
    assert rows["scale"]["grad"] == pytest.approx(rows["scale"]["finite_difference"], rel=1e-4)
    assert "the loss does not depend on unused" in trainkit(*asked).stdout


# ------------------------------------------------------------------------------------------ find-lr


def test_find_lr_suggests_a_rate_that_learns_and_draws_the_curve(trainkit: Command, tmp_path: Path) -> None:
    done = trainkit("find-lr", "optim=adam", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1e-4 < found["suggestion"] < 1e-2
    assert found["groups"] == {"default": found["suggestion"]}
    assert (tmp_path / found["picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / found["picture"]).with_suffix(".json").read_text()) == found
    assert found["rates"][0] == 1e-7
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"])
    assert not (tmp_path / "outputs/latest").exists()


def test_the_rates_rise_by_the_same_factor_and_the_groups_keep_their_ratios() -> None:
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


def test_the_rate_tried_is_the_first_optimizers_own_where_the_root_has_none() -> None:
    settings = compose_settings(["optim=sgd", "param_groups=head_lr"])
    session = build.build_session(settings)
    test = range_test(session.state, session.train, None, 1e-6, 1e-2, 10)
    assert test.ratios == pytest.approx({"head": 10.0, "default": 1.0})


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = [10 ** (place / 20 - 6) for place in range(100)]
    falling = [2 - math.tanh((math.log10(rate) + 3) * 2) for rate in rates]  # steepest at 1e-3
    rising = [math.exp(40 * (math.log10(rate) + 2)) if rate > 1e-2 else 0.0 for rate in rates]
    test = RangeTest({"default": 1.0}, 2.0, rates, [a + b for a, b in zip(falling, rising, strict=True)])
    assert test.suggestion() == pytest.approx(1e-3, rel=0.2)
    assert RangeTest({}, 1.0, rates, [1.0 + place for place in range(100)]).suggestion() is None


def test_find_lr_says_so_where_no_rate_helps(forked: Command) -> None:
    done = forked("find-lr", "--start", "5", "--end", "50", "--steps", "10", "experiment=line_fit")
    assert done.returncode == 0, done.stderr
    assert "no suggestion" in done.stdout
    assert "then the loss diverged" in done.stdout


def test_what_is_noise_is_no_fall() -> None:
    rates = [10 ** (place / 20 - 6) for place in range(100)]
    for seed in range(20):
        noise = (2.3 + 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(seed))).tolist()
        assert RangeTest({}, 3.0, rates, noise).suggestion() is None
        fall = [loss - 0.4 * (1 + math.tanh(2 * (math.log10(r) + 3))) for loss, r in zip(noise, rates, strict=True)]
        assert RangeTest({}, 3.0, rates, fall).suggestion() == pytest.approx(1e-3, rel=2)


def test_a_loss_that_is_not_finite_ends_with_exit_code_4(forked: Command) -> None:
    for command in ("find-lr", "inspect"):
        done = forked(command, "experiment=line_fit", "model.init=nan")
        assert done.returncode == 4
        assert "loss is" in done.stderr


def test_find_lr_writes_where_it_is_told_and_over_no_answer(forked: Command) -> None:
    asked = ["find-lr", "experiment=line_fit", "--steps", "10", "hydra.run.dir=here"]
    assert forked(*asked, MPLBACKEND="module://nowhere").returncode == 0
    again = forked(*asked)
    assert again.returncode == 7
    assert "here holds a run already (find_lr.json)" in again.stderr

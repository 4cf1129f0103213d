"""`trainkit params`, and the command lines of the diagnostic commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import nn

from tests.conftest import Command
from trainkit.cli.help import command_help
from trainkit.cli.main import dispatch
from trainkit.core.errors import ConfigError

RESNET = """
_target_: torchvision.models.resnet18
num_classes: ${data.classes}
"""


def test_no_decay_turns_weight_decay_off_for_exactly_the_norms_and_biases_of_a_resnet(
    trainkit: Command, tmp_path: Path
) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/resnet.yaml").write_text(RESNET)
    done = trainkit("params", "model=resnet", "optim=adamw", "param_groups=no_decay", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}

    from torchvision.models import resnet18

    expected = {}
    for path, module in resnet18(num_classes=10).named_modules():
        for name, param in module.named_parameters(recurse=False):
            undecayed = isinstance(module, nn.BatchNorm2d) or name == "bias"
            expected[f"{path}.{name}"] = (0 if undecayed else 0.01, list(param.shape))
    assert {name: (row["options"]["weight_decay"], row["shape"]) for name, row in rows.items()} == expected
    assert rows["bn1.weight"]["decided_by"]["weight_decay"] == "norms"
    assert rows["fc.bias"]["decided_by"]["weight_decay"] == "biases"
    assert rows["fc.weight"]["decided_by"]["weight_decay"] == "default"
    keys = {"name", "shape", "count", "group", "optimizer", "options", "decided_by", "trainable"}
    assert all(keys <= row.keys() for row in rows.values())


def test_params_prints_a_table_and_trains_nothing(trainkit: Command, tmp_path: Path) -> None:
    done = trainkit("params", "param_groups=head_lr", "+param_groups.stem={module: conv1, freeze: true}")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["fc2.weight"].split()[1:] == ["10x64", "640", "4", "head", "SGD", "0.1", "(head)", "0"]
    assert "frozen (stem)" in lines["conv1.bias"]
    assert "10 tensors, 145,578 parameters, 143,146 of them trainable" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_run_prints_its_param_groups_and_saves_the_parameter_table(forked: Command, tmp_path: Path) -> None:
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


def test_params_reports_all_wrong_rules_with_exit_code_2(forked: Command) -> None:
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
        (["find-lr", "--start", "1", "--end", "0.1"], "less than --end"),
        (["find_lr"], "did you mean trainkit find-lr?"),
        (["params", "optim=sgdd"], "did you mean optim=sgd?"),
    ],
)
def test_a_wrong_command_line_is_an_error(argv: list[str], words: str, forked: Command) -> None:
    done = forked(*argv)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_non_finite_loss_ends_with_exit_code_4(forked: Command) -> None:
    for command in ("find-lr", "inspect"):
        done = forked(command, "experiment=line_fit", "model.init=nan")
        assert done.returncode == 4
        assert "loss is" in done.stderr


@pytest.mark.parametrize("command", ["resume", "export"])
def test_a_command_without_its_run_says_so(command: str) -> None:
    with pytest.raises(ConfigError, match=f"{command} needs a run"):
        dispatch([command])
    with pytest.raises(ConfigError, match=f"{command} takes no flag of Hydra"):
        dispatch([command, "last", "-m"])


@pytest.mark.parametrize(("word", "flag"), [("version", "--version"), ("help", "--help"), ("versions", "--version")])
def test_a_flag_without_dashes_is_suggested_with_them(word: str, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dispatch([word])
    assert caught.value.problems[0].hint == f"write trainkit {flag}"


def test_the_flags_of_one_command_are_explained_without_the_names_of_others() -> None:
    assert re.search(r"--json +print JSON$", command_help("eval"), re.MULTILINE)

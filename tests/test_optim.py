"""Param groups by rule, against groups written by hand; and every wrong rule's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainkit.errors import ConfigError
from trainkit.models import ToyCNN
from trainkit.optim import Group, named_params, options_of, resolve

SGD = options_of(torch.optim.SGD)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def groups_of(model: nn.Module, rules: dict[str, Any], lr: float = 0.1) -> list[Group]:
    return resolve(named_params(model), rules, lr, SGD)


def told(model: nn.Module, rules: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        groups_of(model, rules)
    return str(caught.value)


def layout(groups: list[Group]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    return {group.name: (group.options, [param.name for param in group.params]) for group in groups}


def test_without_rules_all_parameters_are_the_group_default() -> None:
    model = ToyCNN()
    assert layout(groups_of(model, {})) == {"default": ({"lr": 0.1}, [n for n, _ in model.named_parameters()])}


def test_the_first_rule_that_sets_a_field_decides_it_field_by_field() -> None:
    rules = {
        "head": {"module": "fc2", "lr_mult": 10},
        "biases": {"name": r".*\.bias", "weight_decay": 0.0, "lr_mult": 2},
    }
    groups = layout(groups_of(ToyCNN(), rules))
    assert groups["head"] == ({"lr": 1.0}, ["fc2.weight"])
    assert groups["head+biases"] == ({"lr": 1.0, "weight_decay": 0.0}, ["fc2.bias"])
    assert groups["biases"][0] == {"lr": 0.2, "weight_decay": 0.0}
    assert groups["biases"][1] == ["conv1.bias", "conv2.bias", "conv3.bias", "fc1.bias"]
    assert groups["default"][1] == ["conv1.weight", "conv2.weight", "conv3.weight", "fc1.weight"]


def test_selectors_must_all_hold() -> None:
    rules = {
        "w": {
            "type": ["Conv2d", "torch.nn.modules.linear.Linear"],
            "ndim": 2,
            "module": "fc1",
            "momentum": 0.5,
        }
    }
    assert layout(groups_of(ToyCNN(), rules))["w"] == ({"lr": 0.1, "momentum": 0.5}, ["fc1.weight"])


def test_a_type_matches_subclasses_too() -> None:
    groups = layout(
        groups_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), {"n": {"type": "_BatchNorm", "lr": 1}})
    )
    assert groups["n"][1] == ["1.weight", "1.bias"]


def test_a_type_may_be_any_dotted_path_to_the_class() -> None:
    groups = layout(groups_of(ToyCNN(), {"c": {"type": "torch.nn.Conv2d", "lr": 1}}))
    assert len(groups["c"][1]) == 6


def test_a_module_is_a_whole_path_prefix() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "fc2": nn.Linear(1, 1)})
    assert layout(groups_of(model, {"a": {"module": "fc", "lr": 1}}))["a"][1] == ["fc.weight", "fc.bias"]


def test_equal_groups_are_merged_in_the_order_of_the_rules_and_named_apart() -> None:
    rules = {"b": {"name": ".*bias", "lr_mult": 2}, "a": {"module": "fc2", "lr": 0.2}}
    groups = groups_of(ToyCNN(), rules)
    biases = ["conv1.bias", "conv2.bias", "conv3.bias", "fc1.bias"]
    assert layout(groups)["b|a"] == ({"lr": 0.2}, [*biases, "fc2.weight"])
    assert layout(groups)["b+a"] == ({"lr": 0.4}, ["fc2.bias"])
    assert [group.name for group in groups][-1] == "default"


def test_freeze_keeps_a_parameter_out_of_the_optimizer() -> None:
    model = ToyCNN()
    groups = groups_of(model, {"stem": {"module": "conv1", "freeze": True}})
    assert not model.conv1.weight.requires_grad
    assert "conv1.weight" not in layout(groups)["default"][1]


def test_nothing_turns_requires_grad_on() -> None:
    model = ToyCNN()
    model.conv1.weight.requires_grad_(False)
    names = layout(groups_of(model, {"keep": {"module": "conv1", "freeze": False, "lr": 1}}))
    assert not model.conv1.weight.requires_grad
    assert names["keep"][1] == ["conv1.bias"]


def test_a_tied_parameter_counts_once_under_its_first_name() -> None:
    groups = groups_of(Tied(), {"both": {"name": "embed.weight|head.weight", "lr": 1}})
    assert layout(groups)["both"][1] == ["embed.weight"]
    params = [p for group in groups for p in group.for_optimizer()["params"]]
    assert len({id(p) for p in params}) == len(params) == 3


def test_a_tied_parameter_whose_names_are_decided_differently_is_an_error_that_names_both() -> None:
    message = told(Tied(), {"head": {"module": "head", "lr": 1}})
    assert "embed.weight" in message
    assert "head.weight" in message


def test_learnable_parameters_of_the_loss_are_named_loss() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_t = nn.Parameter(torch.zeros(()))

    params = named_params(nn.Linear(1, 1), Temperature())
    groups = resolve(params, {"t": {"name": r"loss\..*", "lr_mult": 0.5}}, 1.0, SGD)
    assert layout(groups)["t"] == ({"lr": 0.5}, ["loss.log_t"])


def test_an_optimizer_takes_the_groups_with_their_names() -> None:
    groups = groups_of(ToyCNN(), {"head": {"module": "fc2", "lr_mult": 10}})
    optimizer = torch.optim.SGD([group.for_optimizer() for group in groups], lr=0.1)
    assert [group["name"] for group in optimizer.param_groups] == ["head", "default"]
    assert optimizer.param_groups[0]["param_names"] == ["fc2.weight", "fc2.bias"]
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"a": {"name": "fc9.*", "lr": 1}}, ["param_groups.a", "no parameter matches", "fc"]),
        ({"a": {"module": "fc3", "lr": 1}}, ["no parameter matches", "did you mean module: fc"]),
        ({"a": {"type": "Conv2D", "lr": 1}}, ["no parameter matches", "Conv2d"]),
        (
            {"a": {"module": "fc1", "momentun": 1}},
            ["param_groups.a.momentun", "did you mean param_groups.a.momentum?"],
        ),
        ({"a": {"modul": "fc1", "lr": 1}}, ["param_groups.a.modul", "did you mean param_groups.a.module?"]),
        ({"a": {"lr": 1}}, ["no selector"]),
        ({"a": {"module": "fc1"}}, ["sets nothing"]),
        ({"a": {"module": "fc1", "lr": 1, "lr_mult": 2}}, ["both lr and lr_mult"]),
        ({"a": {"module": "fc1", "lr": -1}}, ["param_groups.a.lr=-1", "at least 0"]),
        ({"a": {"name": "(", "lr": 1}}, ["no regular expression"]),
        ({"a": {"module": 7, "lr": 1}}, ["param_groups.a.module=7", "type str"]),
        ({"default": {"module": "fc1", "lr": 1}}, ["param_groups.default", "another name"]),
        ({"a": 3}, ["param_groups.a", "mapping"]),
        (
            {"a": {"module": "fc1", "lr": 1}, "b": {"module": "fc1", "lr": 2}},
            ["param_groups.b", "decided before it, by a"],
        ),
        (
            {"f": {"module": "fc1", "freeze": True}, "b": {"module": "fc1", "lr": 2}},
            ["param_groups.b", "only frozen"],
        ),
        ({"f": {"name": ".*", "freeze": True}}, ["no trainable parameter"]),
    ],
)
def test_a_wrong_rule_is_an_error_that_names_it_and_the_way_out(rules: dict[str, Any], words: list[str]) -> None:
    message = told(ToyCNN(), rules)
    assert all(word in message for word in words), message


def test_all_wrong_rules_are_told_at_once() -> None:
    message = told(ToyCNN(), {"a": {"module": "fc8", "lr": 1}, "b": {"type": "Conv7", "lr": 1}})
    assert "param_groups.a" in message
    assert "param_groups.b" in message


def test_optional_allows_a_rule_that_matches_nothing() -> None:
    assert layout(groups_of(ToyCNN(), {"a": {"module": "nowhere", "lr": 1, "optional": True}})).keys() == {"default"}

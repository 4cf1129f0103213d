"""Param groups by rule, against groups written by hand; and every wrong rule's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from trainkit import compose
from trainkit.build.optim import build_optimizers
from trainkit.config.compose import CONF
from trainkit.core.errors import ConfigError
from trainkit.models import GRUClassifier, RowCNN, ToyCNN
from trainkit.optim.groups import Group, param_table, resolve_groups
from trainkit.optim.params import named_params
from trainkit.optim.rules import OptimizerOptions

SGD = {"SGD": OptimizerOptions.from_signature(torch.optim.SGD, {"lr": 0.1})}
ByHand = list[tuple[dict[str, Any], list[str]]]  # of each group: the options that differ, the names in it
Case = tuple[str, list[str], dict[str, Any], Callable[[dict[str, nn.Parameter]], ByHand]]


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def frozen_parts() -> nn.Module:
    model = ToyCNN()
    model.conv1.requires_grad_(False)
    model.fc1.bias.requires_grad_(False)
    return model


def two_modules() -> nn.Module:
    model = nn.Sequential()
    model.add_module("cnn", RowCNN())
    model.add_module("gru", GRUClassifier())
    model(torch.zeros(1, 3, 32, 32))
    return model


def torchvision_model(name: str) -> nn.Module:
    from torchvision import models

    with torch.device("meta"):
        model: nn.Module = getattr(models, name)(num_classes=10)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy_cnn": ToyCNN,
    "resnet18": lambda: torchvision_model("resnet18"),
    "vit_b_16": lambda: torchvision_model("vit_b_16"),
    "tied": Tied,
    "frozen parts": frozen_parts,
    "two modules": two_modules,
}


def shipped(name: str) -> dict[str, Any]:
    rules: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "param_groups" / f"{name}.yaml"))  # type: ignore[assignment]
    return rules


def without(params: dict[str, nn.Parameter], *out: list[str]) -> list[str]:
    """The trainable names that are in none of the lists."""
    return [name for name, p in params.items() if p.requires_grad and not any(name in names for names in out)]


def starting(params: dict[str, nn.Parameter], *prefixes: str) -> list[str]:
    return [name for name in params if name.startswith(prefixes)]


def one_dimensional(params: dict[str, nn.Parameter]) -> list[str]:
    return [name for name, p in params.items() if p.dim() < 2]


def biases(params: dict[str, nn.Parameter]) -> list[str]:
    return [name for name in params if name.endswith("bias")]


def vit_layers(params: dict[str, nn.Parameter]) -> ByHand:
    """The groups of a ViT's layer decay as BEiT numbers the layers: embeddings 0, block i at i + 1, head 13."""
    stem = ["class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"]
    blocks = [starting(params, f"encoder.layers.encoder_layer_{i}.") for i in range(12)]
    head = starting(params, "encoder.ln", "heads")
    return [({"lr": 0.001 * 0.75 ** (13 - i)}, names) for i, names in enumerate([stem, *blocks, head])]


def resnet_layers(params: dict[str, nn.Parameter]) -> ByHand:
    blocks = [starting(params, f"layer{i}.{j}.") for i in (1, 2, 3, 4) for j in (0, 1)]
    parts = [starting(params, "conv1", "bn1"), *blocks, ["fc.weight", "fc.bias"]]
    return [({"lr": 0.01 * 0.5 ** (9 - i)}, names) for i, names in enumerate(parts)]


CASES: dict[str, Case] = {
    "no rules": ("toy_cnn", ["sgd"], {}, lambda p: [({}, list(p))]),
    "a head at its own rate": (
        "toy_cnn",
        ["sgd"],
        {"head": {"module": "fc2", "lr_mult": 10}},
        lambda p: [({"lr": 0.01 * 10}, ["fc2.weight", "fc2.bias"]), ({}, starting(p, "conv", "fc1"))],
    ),
    "per field, the first rule that sets it": (
        "toy_cnn",
        ["sgd", "optim.weight_decay=0.1"],
        {
            "head": {"module": "fc2", "lr_mult": 10},
            "biases": {"name": r".*\.bias", "weight_decay": 0, "lr_mult": 2, "momentum": 0.5},
        },
        lambda p: [
            ({"lr": 0.1}, ["fc2.weight"]),
            ({"lr": 0.1, "weight_decay": 0, "momentum": 0.5}, ["fc2.bias"]),
            ({"lr": 0.02, "weight_decay": 0, "momentum": 0.5}, [n for n in biases(p) if n != "fc2.bias"]),
            ({}, [n for n in p if "weight" in n and n != "fc2.weight"]),
        ],
    ),
    "by dimension": (
        "toy_cnn",
        ["adam"],
        {"matrices": {"ndim": 2, "betas": [0.8, 0.95]}, "filters": {"ndim": 4, "eps": 1e-6}},
        lambda p: [
            ({"betas": [0.8, 0.95]}, ["fc1.weight", "fc2.weight"]),
            ({"eps": 1e-6}, [f"conv{i}.weight" for i in (1, 2, 3)]),
            ({}, biases(p)),
        ],
    ),
    "a rule for everything": (
        "toy_cnn",
        ["adamw"],
        {"first": {"name": "conv1.*", "lr": 0.5}, "all": {"name": ".*", "weight_decay": 0.2}},
        lambda p: [
            ({"lr": 0.5, "weight_decay": 0.2}, ["conv1.weight", "conv1.bias"]),
            ({"weight_decay": 0.2}, [n for n in p if not n.startswith("conv1")]),
        ],
    ),
    "no decay on norms and biases": (
        "resnet18",
        ["adamw"],
        shipped("no_decay"),
        lambda p: [({"weight_decay": 0}, one_dimensional(p)), ({}, without(p, one_dimensional(p)))],
    ),
    "freeze the stem, another rate for the head": (
        "resnet18",
        ["sgd", "optim.momentum=0.9"],
        {"stem": {"module": ["conv1", "bn1", "layer1"], "freeze": True}, "head": {"module": "fc", "lr_mult": 3}},
        lambda p: [
            ({"lr": 0.01 * 3}, ["fc.weight", "fc.bias"]),
            ({}, [n for n in p if not n.startswith(("conv1", "bn1", "layer1", "fc"))]),
        ],
    ),
    "layer decay of a residual network": (
        "resnet18",
        ["sgd"],
        {"all": {"name": ".*", "layer_decay": 0.5}},
        resnet_layers,
    ),
    "the last layer": (
        "resnet18",
        ["sgd"],
        shipped("head_lr"),
        lambda p: [({"lr": 0.1}, ["fc.weight", "fc.bias"]), ({}, [n for n in p if not n.startswith("fc")])],
    ),
    "layer decay of a transformer": ("vit_b_16", ["adamw"], shipped("layer_decay"), vit_layers),
    "layer decay counts frozen layers too": (
        "vit_b_16",
        ["adamw"],
        {"stem": {"layer": [0, 1, 2], "freeze": True}, **shipped("layer_decay")},
        lambda p: vit_layers(p)[3:],
    ),
    "no decay in a transformer": (
        "vit_b_16",
        ["adamw"],
        {"tokens": {"name": "class_token|.*pos_embedding", "weight_decay": 0}, **shipped("no_decay")},
        lambda p: [
            ({"weight_decay": 0}, ["class_token", "encoder.pos_embedding", *one_dimensional(p)]),
            ({}, [n for n, q in p.items() if q.dim() in (2, 4)]),
        ],
    ),
    "a tied weight is matched by all its names": (
        "tied",
        ["sgd"],
        {"both": {"name": r"(embed|head)\.weight", "lr_mult": 2}},
        lambda _: [({"lr": 0.02}, ["embed.weight"]), ({}, ["norm.weight", "norm.bias"])],
    ),
    "a tied weight in the shipped groups": (
        "tied",
        ["adamw"],
        {**shipped("no_decay"), **shipped("layer_decay")},
        lambda _: [({"weight_decay": 0}, ["norm.weight", "norm.bias"]), ({}, ["embed.weight"])],
    ),
    "frozen parts stay out": (
        "frozen parts",
        ["sgd", "optim.weight_decay=0.1"],
        {"biases": {"name": ".*bias", "weight_decay": 0}},
        lambda p: [({"weight_decay": 0}, ["conv2.bias", "conv3.bias", "fc2.bias"]), ({}, without(p, biases(p)))],
    ),
    "freezing more": (
        "frozen parts",
        ["rmsprop"],
        {"convs": {"type": "Conv2d", "freeze": True}, "rest": {"type": "torch.nn.Linear", "alpha": 0.9}},
        lambda _: [({"alpha": 0.9}, ["fc1.weight", "fc2.weight", "fc2.bias"])],
    ),
    "two modules": (
        "two modules",
        ["adam"],
        {"cnn": {"module": "cnn", "lr_mult": 0.1}, "gru": {"module": "gru", "lr": 0.5, "weight_decay": 0.1}},
        lambda p: [({"lr": 0.001 * 0.1}, starting(p, "cnn")), ({"lr": 0.5, "weight_decay": 0.1}, starting(p, "gru"))],
    ),
    "recurrent biases": (
        "two modules",
        ["adamw"],
        shipped("no_decay"),
        lambda p: [({"weight_decay": 0}, [n for n in p if "bias" in n]), ({}, [n for n in p if "bias" not in n])],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_optimizers_groups_are_those_written_by_hand(case: str, here: Any) -> None:  # noqa: ARG001
    name, overrides, rules, by_hand = CASES[case]
    model = MODELS[name]()
    config = compose([f"optim={overrides[0]}", *overrides[1:]])
    OmegaConf.update(config, "param_groups", rules, force_add=True)
    config.param_groups = rules
    optimizers, _, _ = build_optimizers(config, named_params(model))
    (optimizer,) = optimizers.values()

    params = dict(model.named_parameters())
    groups = [(options, sorted(names, key=list(params).index)) for options, names in by_hand(params)]
    wanted = type(optimizer)(
        [{"params": [params[n] for n in names], **options} for options, names in groups],
        **{key: value for key, value in config.optim.items() if key != "_target_"},
    )
    named, how = {"name", "param_names"}, {"fused"}  # how a step is computed is no option of a group
    assert len(optimizer.param_groups) == len(wanted.param_groups)
    for ours, theirs in zip(optimizer.param_groups, wanted.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        options = {key: value for key, value in ours.items() if key not in {"params", *named, *how}}
        assert options == {key: value for key, value in theirs.items() if key not in {"params", *how}}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trainable_is_optimized_exactly_once(case: str) -> None:
    name, _, rules, _ = CASES[case]
    model = MODELS[name]()
    known = {"A": OptimizerOptions({"lr": 0.1, "weight_decay": 0.1, "momentum": 0, "betas": 0, "eps": 0, "alpha": 0})}
    groups = resolve_groups(named_params(model), rules, known)
    held = [id(p.tensor) for group in groups for p in group.params]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------- rules


def groups_of(model: nn.Module, rules: dict[str, Any]) -> list[Group]:
    return resolve_groups(named_params(model), rules, SGD)


def told(model: nn.Module, rules: dict[str, Any], known: dict[str, OptimizerOptions] = SGD) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_groups(named_params(model), rules, known)
    return str(caught.value)


def layout(groups: list[Group]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    return {group.name: (group.options, [param.name for param in group.params]) for group in groups}


def test_selectors_must_all_hold() -> None:
    rule = {"type": ["Conv2d", "torch.nn.modules.linear.Linear"], "ndim": 2, "module": "fc1", "momentum": 0.5}
    assert layout(groups_of(ToyCNN(), {"w": rule}))["w"] == ({"lr": 0.1, "momentum": 0.5}, ["fc1.weight"])


def test_a_type_matches_subclasses_too() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert layout(groups_of(model, {"n": {"type": "_BatchNorm", "lr": 1}}))["n"][1] == ["1.weight", "1.bias"]


def test_a_type_may_be_any_dotted_path_to_the_class() -> None:
    assert len(layout(groups_of(ToyCNN(), {"c": {"type": "torch.nn.Conv2d", "lr": 1}}))["c"][1]) == 6


def test_a_module_is_a_whole_path_prefix() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "fc2": nn.Linear(1, 1)})
    assert layout(groups_of(model, {"a": {"module": "fc", "lr": 1}}))["a"][1] == ["fc.weight", "fc.bias"]


def test_a_layer_counts_from_the_input_or_backwards_from_the_head() -> None:
    groups = layout(groups_of(ToyCNN(), {"ends": {"layer": [0, -1], "lr": 1}}))
    assert groups["ends"][1] == ["conv1.weight", "conv1.bias", "fc2.weight", "fc2.bias"]


def test_equal_groups_are_merged_in_the_order_of_the_rules_and_named_apart() -> None:
    rules = {"b": {"name": ".*bias", "lr_mult": 2}, "a": {"module": "fc2", "lr": 0.2}}
    groups = groups_of(ToyCNN(), rules)
    biases = ["conv1.bias", "conv2.bias", "conv3.bias", "fc1.bias"]
    assert layout(groups)["b|a"] == ({"lr": 0.2}, [*biases, "fc2.weight"])
    assert layout(groups)["b+a"] == ({"lr": 0.4}, ["fc2.bias"])
    assert [group.name for group in groups][-1] == "default"


def test_a_rule_that_sets_what_is_in_force_anyway_makes_no_group_of_its_own() -> None:
    assert layout(groups_of(ToyCNN(), {"b": {"name": ".*bias", "weight_decay": 0}})).keys() == {"default"}


def test_the_groups_of_a_layer_decay_carry_the_number_of_the_layer() -> None:
    rules = {"layers": {"name": ".*", "layer_decay": 0.5}}
    groups = groups_of(ToyCNN(), rules)
    assert [group.name for group in groups] == [f"layers[{i}]" for i in range(5)]
    assert [group.options["lr"] for group in groups] == [0.1 * 0.5 ** (4 - i) for i in range(5)]


def test_freeze_keeps_a_parameter_out_of_the_optimizer() -> None:
    model = ToyCNN()
    groups = groups_of(model, {"stem": {"module": "conv1", "freeze": True}})
    assert not model.conv1.weight.requires_grad
    assert "conv1.weight" not in layout(groups)["default"][1]


def test_nothing_is_frozen_where_the_rules_are_wrong() -> None:
    model = ToyCNN()
    told(model, {"stem": {"module": "conv1", "freeze": True}, "x": {"module": "nowhere", "lr": 1}})
    assert model.conv1.weight.requires_grad


def test_nothing_turns_requires_grad_on() -> None:
    model = ToyCNN()
    model.conv1.weight.requires_grad_(False)
    names = layout(groups_of(model, {"keep": {"module": "conv1", "freeze": False, "lr": 1}}))
    assert not model.conv1.weight.requires_grad
    assert names["keep"][1] == ["conv1.bias"]


def test_learnable_parameters_of_the_loss_are_named_loss() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_t = nn.Parameter(torch.zeros(()))

    params = named_params(nn.Linear(1, 1), Temperature())
    groups = resolve_groups(params, {"t": {"name": r"loss\..*", "lr_mult": 0.5}}, SGD)
    assert layout(groups)["t"] == ({"lr": 0.05}, ["loss.log_t"])


def test_a_parameter_of_the_model_and_one_of_the_loss_may_not_share_a_name() -> None:
    with pytest.raises(ConfigError, match=r"loss\.weight is a parameter of the model and of the loss"):
        named_params(nn.ModuleDict({"loss": nn.Linear(1, 1)}), nn.Linear(1, 1))


def test_the_type_of_a_computed_weight_is_its_modules() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    groups = groups_of(nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.PReLU()), {"l": {"type": "Linear", "lr": 1}})
    assert len(layout(groups)["l"][1]) == 3  # the bias, and what the weight is computed from


def test_an_option_that_an_optimizer_takes_once_for_all_is_no_rules(here: Any) -> None:  # noqa: ARG001
    config = compose(["optim=adagrad", "+param_groups.h={module: fc2, initial_accumulator_value: 2.0}"])
    with pytest.raises(ConfigError, match="Adagrad takes initial_accumulator_value once for all parameters"):
        build_optimizers(config, named_params(ToyCNN()))


def test_an_optimizer_takes_the_groups_with_their_names() -> None:
    groups = groups_of(ToyCNN(), {"head": {"module": "fc2", "lr_mult": 10}})
    optimizer = torch.optim.SGD([group.as_param_group() for group in groups], lr=0.1)
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
            {"a": {"module": ["fc1", "fc9"], "lr": 1}},
            ["param_groups.a.module: no parameter matches 'fc9'", "did you mean"],
        ),
        ({"a": {"name": "bias", "lr": 1}}, ["it must match the whole name: name: '.*bias.*'"]),
        ({"a": {"name": ".*", "layer_decay": 2}}, ["param_groups.a.layer_decay=2: must be at most 1"]),
        ({"a": {"layer": 7, "lr": 1}}, ["no parameter matches {'layer': 7}", "0, 1, 2, 3, 4"]),
        ({"a": {"module": "fc1", "ndim": 4, "lr": 1}}, ["no parameter matches", "none matches all of them"]),
        ({"a": {"module": "fc1", "momentun": 1}}, ["param_groups.a.momentun", "did you mean param_groups.a.momentum?"]),
        ({"a": {"module": "fc1", "amsgrad": True}}, ["param_groups.a.amsgrad", "SGD has", "nesterov, weight_decay"]),
        ({"a": {"modul": "fc1", "lr": 1}}, ["param_groups.a.modul", "did you mean param_groups.a.module?"]),
        ({"a": {"lr": 1}}, ["no selector"]),
        ({"a": {"module": "fc1"}}, ["sets nothing"]),
        ({"a": {"module": "fc1", "lr": 1, "lr_mult": 2}}, ["both lr and lr_mult"]),
        ({"a": {"name": ".*", "layer_decay": 1, "lr_mult": 2}}, ["both lr_mult and layer_decay"]),
        ({"a": {"module": "fc1", "lr": -1}}, ["param_groups.a.lr=-1", "at least 0"]),
        ({"a": {"module": "fc1", "lr": float("nan")}}, ["param_groups.a.lr=nan", "at least 0"]),
        ({"a": {"name": "(", "lr": 1}}, ["no regular expression"]),
        ({"a": {"module": 7, "lr": 1}}, ["param_groups.a.module=7", "type str"]),
        ({"a": {"module": [], "lr": 1}}, ["param_groups.a.module=[]", "names nothing"]),
        ({"a": {"ndim": True, "lr": 1}}, ["param_groups.a.ndim=True", "type int"]),
        ({"a": {"module": "fc1", "optimizer": "adam"}}, ["param_groups.a.optimizer=adam", "one optimizer, SGD"]),
        ({"default": {"module": "fc1", "lr": 1}}, ["param_groups.default", "another name"]),
        ({"a+b": {"module": "fc1", "lr": 1}}, ["param_groups.a+b", "another name"]),
        ({"a": 3}, ["param_groups.a", "mapping"]),
        ({"a": {"module": "fc1", "lr": 1}, "b": {"module": "fc1", "lr": 2}}, ["param_groups.b", "before it, by a"]),
        ({"f": {"module": "fc1", "freeze": True}, "b": {"module": "fc1", "lr": 2}}, ["param_groups.b", "only frozen"]),
        ({"f": {"name": ".*", "freeze": True}}, ["no trainable parameter"]),
        (
            {"b": {"module": "fc1", "lr": 2}, "f": {"name": "fc1.*", "freeze": True}},
            ["param_groups.b: it decides only frozen parameters (fc1.weight, fc1.bias), frozen by f"],
        ),
    ],
)
def test_a_wrong_rule_is_an_error_that_names_it_and_the_way_out(rules: dict[str, Any], words: list[str]) -> None:
    message = told(ToyCNN(), rules)
    assert all(word in message for word in words), message


def test_a_tied_parameter_whose_names_are_decided_differently_is_an_error_that_names_both() -> None:
    message = told(Tied(), {"head": {"module": "head", "lr": 1}})
    assert "embed.weight and head.weight are one (tied) parameter" in message


def test_a_multiple_of_no_rate_is_an_error() -> None:
    message = told(ToyCNN(), {"a": {"module": "fc1", "lr_mult": 2}}, {"Own": OptimizerOptions({"momentum": 0})})
    assert "param_groups.a: Own has no lr to multiply" in message


def test_a_rule_for_frozen_parameters_alone_is_told_once() -> None:
    rules = {"f": {"module": "fc1", "freeze": True}, "b": {"module": "fc1", "lr": 2}}
    assert told(ToyCNN(), rules).count("param_groups.b:") == 1
    assert told(frozen_parts(), {"b": {"module": "conv1", "lr": 2}}).count("param_groups.b:") == 1


def test_all_wrong_rules_are_told_at_once() -> None:
    message = told(ToyCNN(), {"a": {"module": "fc8", "lr": 1}, "b": {"type": "Conv7", "lr": 1}})
    assert "param_groups.a" in message
    assert "param_groups.b" in message


def test_a_rule_is_switched_off_by_off(here: Any) -> None:  # noqa: ARG001
    config = compose(["param_groups=[no_decay,head_lr]", "optim=adamw", "param_groups.head=off"])
    _, groups, _ = build_optimizers(config, named_params(ToyCNN()))
    assert [group.name for group in groups] == ["biases", "default"]


def test_optional_allows_a_rule_that_matches_nothing() -> None:
    assert layout(groups_of(ToyCNN(), {"a": {"module": "nowhere", "lr": 1, "optional": True}})).keys() == {"default"}


# ------------------------------------------------------------------------------- several optimizers

TWO = {
    "muon": OptimizerOptions.from_signature(torch.optim.Muon, {"lr": 0.02}),
    "sgd": OptimizerOptions.from_signature(torch.optim.SGD, {"lr": 0.1}),
}


def test_what_no_rule_assigns_goes_to_the_optimizer_that_no_rule_names() -> None:
    rules = {"matrices": {"ndim": 2, "optimizer": "muon"}, "head": {"module": "fc2", "lr_mult": 10}}
    groups = resolve_groups(named_params(ToyCNN()), rules, TWO)
    assert [(group.name, group.optimizer, group.options) for group in groups] == [
        ("matrices", "muon", {"lr": 0.02}),
        ("matrices+head", "muon", {"lr": 0.2}),
        ("head", "sgd", {"lr": 1.0}),
        ("default", "sgd", {"lr": 0.1}),
    ]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({}, ["no rule gives an optimizer (muon, sgd) to conv1.weight", "add a last rule"]),
        (
            {"a": {"ndim": 2, "optimizer": "muon"}, "b": {"ndim": 1, "optimizer": "sgd"}},
            ["no rule gives an optimizer", "to conv1.weight, conv2.weight, conv3.weight"],
        ),
        ({"a": {"name": ".*", "optimizer": "muon"}}, ["optim.sgd: it is given no parameter"]),
        ({"a": {"ndim": 2, "optimizer": "muno"}}, ["param_groups.a.optimizer=muno", "did you mean", "muon"]),
        (
            {"a": {"ndim": 2, "optimizer": "muon"}, "b": {"ndim": 2, "dampening": 0.1}},
            ["param_groups.b.dampening: muon, which fc1.weight is in, has no such option", "it has adjust_lr_fn"],
        ),
    ],
)
def test_a_wrong_assignment_is_an_error(rules: dict[str, Any], words: list[str]) -> None:
    message = told(ToyCNN(), rules, TWO)
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------- the table


def test_the_table_tells_of_every_parameter_its_options_and_who_decided_them() -> None:
    model = ToyCNN()
    params = named_params(model)
    rules = {
        "stem": {"module": "conv1", "freeze": True},
        "head": {"module": "fc2", "lr_mult": 10},
        "biases": {"name": ".*bias", "weight_decay": 0.5, "optional": True},
    }
    rows = {row["name"]: row for row in param_table(params, resolve_groups(params, rules, SGD), SGD)}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert rows["conv1.weight"]["trainable"] is False
    assert rows["conv1.weight"]["group"] is None
    assert rows["conv1.weight"]["decided_by"] == {"freeze": "stem"}
    assert rows["fc2.bias"]["shape"] == [10]
    assert rows["fc2.bias"]["count"] == 10
    assert rows["fc2.bias"]["group"] == "head+biases"
    assert rows["fc2.bias"]["optimizer"] == "SGD"
    assert rows["fc2.bias"]["options"]["lr"] == 1.0
    assert rows["fc2.bias"]["options"]["weight_decay"] == 0.5
    assert rows["fc2.bias"]["options"]["momentum"] == 0
    decided = rows["fc2.bias"]["decided_by"]
    assert (decided["lr"], decided["weight_decay"], decided["momentum"]) == ("head", "biases", "default")


def test_the_table_lists_a_tied_parameter_once_with_its_other_names() -> None:
    params = named_params(Tied())
    rows = param_table(params, resolve_groups(params, {}, SGD), SGD)
    assert (rows[0]["name"], rows[0]["aliases"]) == ("embed.weight", ["head.weight"])
    assert len(rows) == 3

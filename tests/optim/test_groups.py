"""Param groups resolved from rules: compared with groups written by hand, and the errors of wrong rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.helpers import compose_settings
from trainkit.build.optim import build_optimizers
from trainkit.config.schema import UNNAMED
from trainkit.config.search_path import CONF
from trainkit.core.errors import ConfigError
from trainkit.models import GRUClassifier, RowCNN, ToyCNN
from trainkit.optim.group_table import param_table
from trainkit.optim.groups import Group, resolve_groups
from trainkit.optim.params import named_params
from trainkit.optim.rules import OptimizerOptions

SGD = {"SGD": OptimizerOptions.from_signature(torch.optim.SGD, {"lr": 0.1})}
ByHand = list[tuple[dict[str, Any], list[str]]]  # for each group: the options that differ, the names of its parameters
Case = tuple[str, list[str], dict[str, Any], Callable[[dict[str, nn.Parameter]], ByHand]]


class Tied(nn.Module):
    """An embedding that shares its weight with the output layer."""

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


def without(params: dict[str, nn.Parameter], *excluded: list[str]) -> list[str]:
    """Return the trainable names that are not in any of the lists."""
    return [name for name, p in params.items() if p.requires_grad and not any(name in names for names in excluded)]


def starting(params: dict[str, nn.Parameter], *prefixes: str) -> list[str]:
    return [name for name in params if name.startswith(prefixes)]


def one_dimensional(params: dict[str, nn.Parameter]) -> list[str]:
    return [name for name, p in params.items() if p.dim() < 2]


def biases(params: dict[str, nn.Parameter]) -> list[str]:
    return [name for name in params if name.endswith("bias")]


def vit_layers(params: dict[str, nn.Parameter]) -> ByHand:
    """Return the groups of a ViT's layer decay. BEiT numbers the embeddings 0, block i as i + 1, the head 13."""
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
    "a learning rate for the head": (
        "toy_cnn",
        ["sgd"],
        {"head": {"module": "fc2", "lr_mult": 10}},
        lambda p: [({"lr": 0.01 * 10}, ["fc2.weight", "fc2.bias"]), ({}, starting(p, "conv", "fc1"))],
    ),
    "the first rule that sets an option decides it": (
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
    "by ndim": (
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
    "a frozen stem and a learning rate for the head": (
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
    "a tied weight is matched by all names": (
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
    "frozen parameters are excluded": (
        "frozen parts",
        ["sgd", "optim.weight_decay=0.1"],
        {"biases": {"name": ".*bias", "weight_decay": 0}},
        lambda p: [({"weight_decay": 0}, ["conv2.bias", "conv3.bias", "fc2.bias"]), ({}, without(p, biases(p)))],
    ),
    "rules freeze further parameters": (
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
def test_groups_equal_groups_written_by_hand(case: str, here: Any) -> None:  # noqa: ARG001
    name, overrides, rules, by_hand = CASES[case]
    model = MODELS[name]()
    settings = replace(compose_settings([f"optim={overrides[0]}", *overrides[1:]]), param_groups=rules)
    optimizers, _, _ = build_optimizers(settings, named_params(model))
    (optimizer,) = optimizers.values()

    params = dict(model.named_parameters())
    groups = [(options, sorted(names, key=list(params).index)) for options, names in by_hand(params)]
    wanted = type(optimizer)(
        [{"params": [params[n] for n in names], **options} for options, names in groups],
        **{key: value for key, value in settings.optim[UNNAMED].items() if key != "_target_"},
    )
    ignored = {"params", "name", "param_names", "fused"}  # names, and how a step is computed
    assert len(optimizer.param_groups) == len(wanted.param_groups)
    for ours, theirs in zip(optimizer.param_groups, wanted.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        options = {key: value for key, value in ours.items() if key not in ignored}
        assert options == {key: value for key, value in theirs.items() if key not in ignored}


@pytest.mark.parametrize("case", CASES)
def test_every_trainable_parameter_is_in_exactly_one_group(case: str) -> None:
    name, _, rules, _ = CASES[case]
    model = MODELS[name]()
    known = {"A": OptimizerOptions({"lr": 0.1, "weight_decay": 0.1, "momentum": 0, "betas": 0, "eps": 0, "alpha": 0})}
    groups = resolve_groups(named_params(model), rules, known)
    held = [id(p.tensor) for group in groups for p in group.params]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------- rules


def groups_of(model: nn.Module, rules: dict[str, Any]) -> list[Group]:
    return resolve_groups(named_params(model), rules, SGD)


def error_message(model: nn.Module, rules: dict[str, Any], known: dict[str, OptimizerOptions] = SGD) -> str:
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


def test_a_type_can_be_any_dotted_path_to_the_class() -> None:
    assert len(layout(groups_of(ToyCNN(), {"c": {"type": "torch.nn.Conv2d", "lr": 1}}))["c"][1]) == 6


def test_a_module_matches_whole_path_components() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "fc2": nn.Linear(1, 1)})
    assert layout(groups_of(model, {"a": {"module": "fc", "lr": 1}}))["a"][1] == ["fc.weight", "fc.bias"]


def test_layers_count_from_the_input_and_negative_layers_from_the_head() -> None:
    groups = layout(groups_of(ToyCNN(), {"ends": {"layer": [0, -1], "lr": 1}}))
    assert groups["ends"][1] == ["conv1.weight", "conv1.bias", "fc2.weight", "fc2.bias"]


def test_groups_with_equal_options_are_merged_and_named_after_their_rules() -> None:
    rules = {"b": {"name": ".*bias", "lr_mult": 2}, "a": {"module": "fc2", "lr": 0.2}}
    groups = groups_of(ToyCNN(), rules)
    biases = ["conv1.bias", "conv2.bias", "conv3.bias", "fc1.bias"]
    assert layout(groups)["b|a"] == ({"lr": 0.2}, [*biases, "fc2.weight"])
    assert layout(groups)["b+a"] == ({"lr": 0.4}, ["fc2.bias"])
    assert [group.name for group in groups][-1] == "default"


def test_a_rule_that_sets_default_values_does_not_make_a_group() -> None:
    assert layout(groups_of(ToyCNN(), {"b": {"name": ".*bias", "weight_decay": 0}})).keys() == {"default"}


def test_groups_of_a_layer_decay_are_named_after_the_layer() -> None:
    rules = {"layers": {"name": ".*", "layer_decay": 0.5}}
    groups = groups_of(ToyCNN(), rules)
    assert [group.name for group in groups] == [f"layers[{i}]" for i in range(5)]
    assert [group.options["lr"] for group in groups] == [0.1 * 0.5 ** (4 - i) for i in range(5)]


def test_a_frozen_parameter_is_not_in_the_optimizer() -> None:
    model = ToyCNN()
    groups = groups_of(model, {"stem": {"module": "conv1", "freeze": True}})
    assert not model.conv1.weight.requires_grad
    assert "conv1.weight" not in layout(groups)["default"][1]


def test_wrong_rules_freeze_nothing() -> None:
    model = ToyCNN()
    error_message(model, {"stem": {"module": "conv1", "freeze": True}, "x": {"module": "nowhere", "lr": 1}})
    assert model.conv1.weight.requires_grad


def test_rules_never_set_requires_grad_to_true() -> None:
    model = ToyCNN()
    model.conv1.weight.requires_grad_(False)
    names = layout(groups_of(model, {"keep": {"module": "conv1", "freeze": False, "lr": 1}}))
    assert not model.conv1.weight.requires_grad
    assert names["keep"][1] == ["conv1.bias"]


def test_parameters_of_the_loss_have_the_prefix_loss() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_t = nn.Parameter(torch.zeros(()))

    params = named_params(nn.Linear(1, 1), Temperature())
    groups = resolve_groups(params, {"t": {"name": r"loss\..*", "lr_mult": 0.5}}, SGD)
    assert layout(groups)["t"] == ({"lr": 0.05}, ["loss.log_t"])


def test_a_name_shared_by_model_and_loss_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"loss\.weight is a parameter of the model and of the loss"):
        named_params(nn.ModuleDict({"loss": nn.Linear(1, 1)}), nn.Linear(1, 1))


def test_the_type_of_a_parametrized_weight_is_that_of_its_module() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    groups = groups_of(nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.PReLU()), {"l": {"type": "Linear", "lr": 1}})
    assert len(layout(groups)["l"][1]) == 3  # the bias and the two parameters that the weight is computed from


def test_an_option_without_per_group_values_is_an_error_in_a_rule(here: Any) -> None:  # noqa: ARG001
    settings = compose_settings(["optim=adagrad", "+param_groups.h={module: fc2, initial_accumulator_value: 2.0}"])
    with pytest.raises(ConfigError, match="Adagrad has one initial_accumulator_value for all parameters"):
        build_optimizers(settings, named_params(ToyCNN()))


def test_param_groups_of_torch_have_names() -> None:
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
        ({"a": {"name": "bias", "lr": 1}}, ["name must match the whole name: write name: '.*bias.*'"]),
        ({"a": {"name": ".*", "layer_decay": 2}}, ["param_groups.a.layer_decay=2: must be at most 1"]),
        ({"a": {"layer": 7, "lr": 1}}, ["no parameter matches {'layer': 7}", "0, 1, 2, 3, 4"]),
        ({"a": {"module": "fc1", "ndim": 4, "lr": 1}}, ["no parameter matches", "no parameter matches all of them"]),
        ({"a": {"module": "fc1", "momentun": 1}}, ["param_groups.a.momentun", "did you mean param_groups.a.momentum?"]),
        ({"a": {"module": "fc1", "amsgrad": True}}, ["param_groups.a.amsgrad", "SGD has", "nesterov, weight_decay"]),
        ({"a": {"modul": "fc1", "lr": 1}}, ["param_groups.a.modul", "did you mean param_groups.a.module?"]),
        ({"a": {"lr": 1}}, ["does not have a selector", "name, module, type, ndim, layer"]),
        ({"a": {"module": "fc1"}}, ["does not set an option"]),
        ({"a": {"module": "fc1", "lr": 1, "lr_mult": 2}}, ["lr and lr_mult set the same learning rate"]),
        ({"a": {"name": ".*", "layer_decay": 1, "lr_mult": 2}}, ["lr_mult and layer_decay set the same learning rate"]),
        ({"a": {"module": "fc1", "lr": -1}}, ["param_groups.a.lr=-1", "at least 0"]),
        ({"a": {"module": "fc1", "lr": float("nan")}}, ["param_groups.a.lr=nan", "at least 0"]),
        ({"a": {"name": "(", "lr": 1}}, ["not a valid regular expression"]),
        ({"a": {"module": 7, "lr": 1}}, ["param_groups.a.module=7", "type str"]),
        ({"a": {"module": [], "lr": 1}}, ["param_groups.a.module=[]", "the list is empty"]),
        ({"a": {"ndim": True, "lr": 1}}, ["param_groups.a.ndim=True", "type int"]),
        ({"a": {"module": "fc1", "optimizer": "adam"}}, ["param_groups.a.optimizer=adam", "one optimizer, SGD"]),
        ({"default": {"module": "fc1", "lr": 1}}, ["param_groups.default", "another name"]),
        ({"a+b": {"module": "fc1", "lr": 1}}, ["param_groups.a+b", "another name"]),
        ({"a": 3}, ["param_groups.a", "mapping"]),
        (
            {"a": {"module": "fc1", "lr": 1}, "b": {"module": "fc1", "lr": 2}},
            ["param_groups.b", "set by earlier rules (a)", "param_groups.b.optional=true"],
        ),
        ({"f": {"module": "fc1", "freeze": True}, "b": {"module": "fc1", "lr": 2}}, ["param_groups.b", "only frozen"]),
        ({"f": {"name": ".*", "freeze": True}}, ["no trainable parameter"]),
        (
            {"b": {"module": "fc1", "lr": 2}, "f": {"name": "fc1.*", "freeze": True}},
            ["param_groups.b: the rule sets options of frozen parameters only (fc1.weight, fc1.bias), frozen by f"],
        ),
    ],
)
def test_a_wrong_rule_is_an_error_with_a_hint(rules: dict[str, Any], words: list[str]) -> None:
    message = error_message(ToyCNN(), rules)
    assert all(word in message for word in words), message


def test_different_options_for_the_names_of_a_tied_parameter_are_an_error() -> None:
    message = error_message(Tied(), {"head": {"module": "head", "lr": 1}})
    assert "embed.weight and head.weight are one (tied) parameter with different options" in message


def test_lr_mult_without_lr_is_an_error() -> None:
    message = error_message(
        ToyCNN(), {"a": {"module": "fc1", "lr_mult": 2}}, {"Custom": OptimizerOptions({"momentum": 0})}
    )
    assert "param_groups.a: Custom has no lr to multiply" in message


def test_a_rule_for_frozen_parameters_is_reported_once() -> None:
    rules = {"f": {"module": "fc1", "freeze": True}, "b": {"module": "fc1", "lr": 2}}
    assert error_message(ToyCNN(), rules).count("param_groups.b:") == 1
    assert error_message(frozen_parts(), {"b": {"module": "conv1", "lr": 2}}).count("param_groups.b:") == 1


def test_all_wrong_rules_are_reported_together() -> None:
    message = error_message(ToyCNN(), {"a": {"module": "fc8", "lr": 1}, "b": {"type": "Conv7", "lr": 1}})
    assert "param_groups.a" in message
    assert "param_groups.b" in message


def test_off_switches_a_rule_off(here: Any) -> None:  # noqa: ARG001
    settings = compose_settings(["param_groups=[no_decay,head_lr]", "optim=adamw", "param_groups.head=off"])
    _, groups, _ = build_optimizers(settings, named_params(ToyCNN()))
    assert [group.name for group in groups] == ["biases", "default"]


def test_optional_allows_a_rule_that_matches_nothing() -> None:
    assert layout(groups_of(ToyCNN(), {"a": {"module": "nowhere", "lr": 1, "optional": True}})).keys() == {"default"}


# ------------------------------------------------------------------------------- several optimizers

TWO = {
    "muon": OptimizerOptions.from_signature(torch.optim.Muon, {"lr": 0.02}),
    "sgd": OptimizerOptions.from_signature(torch.optim.SGD, {"lr": 0.1}),
}


def test_unassigned_parameters_go_to_the_optimizer_that_no_rule_names() -> None:
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
        ({}, ["no rule assigns an optimizer (muon, sgd) to conv1.weight", "add a last rule"]),
        (
            {"a": {"ndim": 2, "optimizer": "muon"}, "b": {"ndim": 1, "optimizer": "sgd"}},
            ["no rule assigns an optimizer", "to conv1.weight, conv2.weight, conv3.weight"],
        ),
        ({"a": {"name": ".*", "optimizer": "muon"}}, ["optim.sgd: no parameter is assigned"]),
        ({"a": {"ndim": 2, "optimizer": "muno"}}, ["param_groups.a.optimizer=muno", "did you mean", "muon"]),
        (
            {"a": {"ndim": 2, "optimizer": "muon"}, "b": {"ndim": 2, "dampening": 0.1}},
            ["param_groups.b.dampening: muon, the optimizer of fc1.weight, does not have", "muon has adjust_lr_fn"],
        ),
    ],
)
def test_a_wrong_assignment_is_an_error(rules: dict[str, Any], words: list[str]) -> None:
    message = error_message(ToyCNN(), rules, TWO)
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------- the table


def test_the_table_has_the_options_of_every_parameter_and_the_rules_that_decided_them() -> None:
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


def test_the_table_lists_a_tied_parameter_once_with_its_aliases() -> None:
    params = named_params(Tied())
    rows = param_table(params, resolve_groups(params, {}, SGD), SGD)
    assert (rows[0]["name"], rows[0]["aliases"]) == ("embed.weight", ["head.weight"])
    assert len(rows) == 3

"""The layers of many models, compared with the numbers in their papers or code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from trainkit.models import ToyCNN
from trainkit.optim.layers import model_layers
from trainkit.optim.params import named_params


def torchvision_model(name: str) -> nn.Module:
    from torchvision import models

    with torch.device("meta"):
        model: nn.Module = getattr(models, name)()
    return model


class Two(nn.Module):
    """A block with two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


class Composed(nn.Module):
    """A block that is composed of blocks, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Two(), Two()


class ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(), ConvNorm(), ConvNorm())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.experts = nn.ModuleList(Two() for _ in range(4))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2, 2)
        self.blocks = nn.Sequential(Composed(), Composed())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Composed() for _ in range(4))


class Nested(nn.Module):
    """Embeddings, an encoder at depth two, a pooler and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"embed": nn.Embedding(5, 2), "encoder": Encoder(), "pooler": nn.Linear(2, 2)})
        self.classifier = nn.Linear(2, 2)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = ToyCNN()


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision_model("resnet18"), 1 + 8 + 1),
    "resnet50": (lambda: torchvision_model("resnet50"), 1 + 16 + 1),
    "vit_b_16": (lambda: torchvision_model("vit_b_16"), 1 + 12 + 1),
    "swin_t": (lambda: torchvision_model("swin_t"), 1 + 12 + 3 + 1),
    "convnext_tiny": (lambda: torchvision_model("convnext_tiny"), 1 + 18 + 3 + 1),
    "efficientnet_b0": (lambda: torchvision_model("efficientnet_b0"), 1 + 16 + 1 + 1),
    "densenet121": (lambda: torchvision_model("densenet121"), 1 + 58 + 3 + 1),
    "vgg16": (lambda: torchvision_model("vgg16"), 16),
    "toy_cnn": (ToyCNN, 5),
    "a model in a model": (Wrapped, 5),
    "a transformer and a head": (lambda: nn.Sequential(torchvision_model("vit_b_16"), nn.Linear(2, 2)), 1 + 12 + 1 + 1),
    "an encoder at depth two": (Nested, 1 + 4 + 1 + 1),
    "residual blocks of convolutions and norms": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(Residual(), Residual()), nn.Linear(2, 2)),
        1 + 2 + 1,
    ),
    "experts side by side": (lambda: nn.Sequential(nn.Linear(2, 2), Experts(), Experts(), nn.Linear(2, 2)), 4),
    "stages": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(Stage(), Stage()), nn.Linear(2, 2)), 1 + 6 + 1),
    "computed weights": (
        lambda: nn.Sequential(*(nn.Sequential(weight_norm(nn.Conv2d(3, 3, 3))) for _ in range(3)), nn.Linear(2, 2)),
        4,
    ),
    "attention alone": (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), 1),
    "one module": (lambda: nn.Linear(2, 2), 1),
    "nothing": (nn.Identity, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_expected_number_of_layers(name: str) -> None:
    make, expected = MODELS[name]
    assert len(model_layers(make())) == expected


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_is_in_exactly_one_layer(name: str) -> None:
    model = MODELS[name][0]()
    held = [id(p) for layer in model_layers(model) for p in layer]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_norm_joins_the_previous_layer_or_the_head() -> None:
    model = torchvision_model("vit_b_16")
    names = {id(p): name for name, p in model.named_parameters()}
    order = [[names[id(p)] for p in layer] for layer in model_layers(model)]
    assert order[-1] == ["encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"]
    model = torchvision_model("resnet18")
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in model_layers(model)[0]] == ["conv1.weight", "bn1.weight", "bn1.bias"]


def test_frozen_parameters_count_and_a_tied_parameter_is_in_its_first_layer() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3, bias=False))
    model[2].weight = model[0].weight
    model[0].requires_grad_(False)
    layer = {param.name: (param.layer, param.height) for param in named_params(model)}
    assert layer == {"0.weight": (0, 1), "1.weight": (1, 0), "1.bias": (1, 0), "2.weight": (0, 1)}

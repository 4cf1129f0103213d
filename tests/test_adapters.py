"""Low-rank adapters, compared with their formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainkit.adapters import LowRank, lora, merge
from trainkit.core.errors import ConfigError
from trainkit.models import ToyCNN


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3))


INPUTS = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_a_new_adapter_changes_nothing_and_only_adapters_are_trained() -> None:
    plain, adapted = small(), lora(small(), rank=2)
    assert torch.equal(plain(INPUTS), adapted(INPUTS))
    trained = [name for name, param in adapted.named_parameters() if param.requires_grad]
    assert trained == [f"{n}.parametrizations.weight.0.{part}" for n in (0, 2, 3) for part in ("down", "up")]


def test_an_adapter_adds_the_scaled_product_of_its_matrices() -> None:
    model = lora(small(), rank=2, alpha=6.0)
    adapter = model.get_submodule("2.parametrizations.weight.0")
    assert isinstance(adapter, LowRank)
    nn.init.normal_(adapter.up)
    original = model.get_parameter("2.parametrizations.weight.original")
    torch.testing.assert_close(model[2].weight, original + 3.0 * adapter.up @ adapter.down)


def test_a_rank_below_1_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.rank=0: must be at least 1"):
        lora(small(), rank=0)


def test_the_gradient_of_an_adapter_is_that_of_the_formula() -> None:
    model = lora(small(), rank=2)
    adapter = model.get_submodule("0.parametrizations.weight.0")
    assert isinstance(adapter, LowRank)
    nn.init.normal_(adapter.up)
    up, down = (part.detach().clone().requires_grad_() for part in (adapter.up, adapter.down))
    layers = list(model.children())
    original = model.get_parameter("0.parametrizations.weight.original")
    weight = original + 8.0 * (up @ down).view(4, 2, 3, 3)
    hidden: Tensor = nn.functional.conv2d(INPUTS, weight, layers[0].bias)  # type: ignore[arg-type]
    for layer in layers[1:]:
        hidden = layer(hidden)
    hidden.square().sum().backward()
    model(INPUTS).square().sum().backward()
    torch.testing.assert_close(adapter.up.grad, up.grad)
    torch.testing.assert_close(adapter.down.grad, down.grad)
    assert original.grad is None


def test_layers_are_chosen_by_name_and_a_head_can_be_trained_whole() -> None:
    model = lora(ToyCNN(), modules="conv.|fc.", train=[r"fc2\..*"])
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {"fc2.weight", "fc2.bias"} < trained
    assert not any(name.startswith("fc2.param") for name in trained)
    assert "fc1.bias" not in trained


def test_merged_weights_have_the_plain_names_and_the_same_outputs() -> None:
    model = lora(small(), rank=2)
    nn.init.normal_(model.get_parameter("2.parametrizations.weight.0.up"))
    before = model(INPUTS)
    assert torch.equal(merge(model)(INPUTS), before)
    assert model.state_dict().keys() == small().state_dict().keys()


@pytest.mark.parametrize(
    ("modules", "train", "words"),
    [("fc3", [], "no layer to adapt matches"), (".*", [r"fc3\..*"], "no parameter matches the pattern fc3")],
)
def test_a_pattern_that_matches_nothing_is_an_error(modules: str, train: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lora(ToyCNN(), modules=modules, train=train)
    assert words in str(caught.value)
    assert "fc2" in str(caught.value)

# ruff: noqa: ARG005
"""How a model is called, by the signature of its forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainkit.core.pytree import Samples
from trainkit.training.call import describe_call, install_call


def model_of(forward: Any) -> nn.Module:
    """Return a module whose forward is a function."""
    model: nn.Module = type("Model", (nn.Module,), {"forward": forward})()
    return model


X, Y = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("forward", "inputs", "expected"),
    [
        (lambda _, x: x, X, X),
        (lambda _, a, b: (a, b), {"b": Y, "a": X}, (X, Y)),
        (lambda _, a, b=None: (a, b), {"a": X}, (X, None)),
        (lambda _, a, **more: (a, more), {"a": X, "b": Y, "text": ["s", "t"]}, (X, {"b": Y})),
        (lambda _, **more: more, {"a": X, "b": Y}, {"a": X, "b": Y}),
        (lambda _, a: a, {"a": X, "text": ["s", "t"]}, X),
        (lambda _, a, text: text, {"a": X, "text": ["s", "t"]}, ["s", "t"]),
        (lambda _, batch: batch, {"a": X, "b": Y}, {"a": X, "b": Y}),
        (lambda _, a: a, {"a": X, "b": Y}, {"a": X, "b": Y}),
        (lambda _, a, b: (b, a), (X, Y), (Y, X)),
        (lambda _, a, b=None: (a, b), [X, Y], (X, Y)),
        (lambda _, *all_of: all_of, (X, Y), (X, Y)),
        (lambda _, pair: pair, (X, Y), (X, Y)),
        (lambda _, a, b, c=0: a, Samples([X, Y]), TypeError),
        (lambda _, images, targets=None: images, Samples([X, Y]), Samples([X, Y])),
        (lambda _, a, b: a, (X, Y, X), TypeError),
    ],
)
def test_the_signature_of_forward_decides_how_the_inputs_are_passed(forward: Any, inputs: Any, expected: Any) -> None:
    model = model_of(forward)
    note = install_call(model, inputs)
    assert (note is None) == isinstance(inputs, Tensor)
    if expected is TypeError:
        with pytest.raises(TypeError):
            model(inputs)
        return
    outputs = model(inputs)
    assert type(outputs) is type(expected)
    assert str(outputs) == str(expected)


class Sum(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum."""
        result: Tensor = self.linear(a) + self.linear(b)
        return result


def test_copies_averages_and_compiled_models_are_called_as_the_model_is() -> None:
    model = Sum()
    install_call(model, {"a": X, "b": Y})
    expected = model(a=X, b=Y)
    averaged = AveragedModel(nn.ModuleDict({"model": model})).module["model"]
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    for copied in (model, copy.deepcopy(model), averaged, compiled):
        assert torch.equal(copied({"a": X, "b": Y}), expected)
    assert [*model.state_dict()] == ["linear.weight", "linear.bias"]


def test_the_first_module_of_a_sequential_takes_the_inputs() -> None:
    model = nn.Sequential(nn.Sequential(Sum()), nn.Flatten(0))
    assert install_call(model, (X, Y)) == ("the model is called as model(*inputs) with (2, 3) float32, (2, 3) float32")
    assert model((X, Y)).shape == (2,)


def test_the_note_says_why_the_inputs_stay_whole() -> None:
    model = model_of(lambda _, a: a)
    note = install_call(model, {"a": X, "b": Y})
    assert note is not None
    assert note.endswith("): forward does not take 'b'")
    assert describe_call(model, {"a": X}).startswith("model(inputs) with inputs a dict")

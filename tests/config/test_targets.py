"""Arguments of a `_target_` are compared with what its class or function accepts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import compose_settings
from trainkit.config.targets import find_wrong_arguments
from trainkit.core.errors import Problem

HERE = "tests.config.test_targets"


def accept_any_keyword(cls: type) -> type:
    """Make a dataclass accept any keyword behind an unchanged signature, as transformers does for its configs."""
    original: Any = cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        original(self, *args, **known)
        vars(self).update(kwargs)

    cls.__init__ = init
    return cls


@accept_any_keyword
@dataclass
class HiddenByWraps:
    hidden_size: int = 768
    layers: list[int] = field(default_factory=list)


class HiddenBySignature:
    def __init__(self, **kwargs: Any) -> None:
        vars(self).update(kwargs)

    __signature__ = inspect.Signature([inspect.Parameter("hidden_size", inspect.Parameter.KEYWORD_ONLY, default=768)])


def _logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("verbose", None)
        return function(*args, **kwargs)

    return wrapper


@_logged
def hidden_function(hidden_size: int = 768) -> int:
    return hidden_size


class HiddenMethod:
    @classmethod
    @_logged
    def make(cls, hidden_size: int = 768) -> int:
        return hidden_size


class NoOwnInit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class NothingAtAll:
    def on_step(self, state: Any) -> None: ...


class OwnNew:
    def __new__(cls, width: int = 1) -> OwnNew:  # noqa: ARG004
        return super().__new__(cls)


def problems(call: Callable[..., Any], **arguments: Any) -> list[Problem]:
    """Return what is wrong with the arguments of an object."""
    return find_wrong_arguments("model", {"_target_": "mine.Net", **arguments}, call)


@pytest.mark.parametrize("call", [HiddenByWraps, HiddenBySignature, hidden_function, HiddenMethod.make])
def test_an_object_that_takes_any_keyword_behind_its_signature_is_never_refused(call: Callable[..., Any]) -> None:
    assert problems(call, num_labels=3) == []
    assert len(problems(call, hidden_size="ten")) == (call is not HiddenBySignature)  # types are still checked


@pytest.mark.parametrize("call", [NoOwnInit, NothingAtAll, object, nn.Module])
def test_arguments_of_a_class_without_an_own_init_are_refused(call: type) -> None:
    assert problems(call) == []
    (problem,) = problems(call, width=3)
    assert problem == Problem("model.width: mine.Net takes no arguments", "to remove it write ~model.width")


def test_a_class_with_an_own_new_is_compared_with_it() -> None:
    assert problems(OwnNew, width=3) == []
    assert len(problems(OwnNew, wide=3)) == 1


def test_a_plain_dataclass_refuses_unknown_arguments() -> None:
    @dataclass
    class Plain:
        width: int = 1

    assert "did you mean model.width?" in str(problems(Plain, wide=3)[0].hint)


def test_arguments_of_a_class_without_an_own_init_are_reported_with_the_other_errors() -> None:
    settings = compose_settings([f"model={HERE}.NoOwnInit", "model.width=3", "+loss.weigth=1"])
    causes = [problem.cause for problem in settings.find_wrong_targets()]
    assert causes == [
        f"model.width: {HERE}.NoOwnInit takes no arguments",
        "loss.weigth: torch.nn.CrossEntropyLoss has no argument 'weigth'",
    ]

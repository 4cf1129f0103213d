"""How a model is called: with the inputs as they are, as `model(*inputs)`, or as `model(**inputs)`.

The signature of `forward` decides, once, on an example of the training data. A forward pre-hook then unpacks
the inputs, so `model(inputs)` works everywhere. If the inputs are a single tensor, the model has no such hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainkit.core.pytree import Samples, describe, tensors_in


@dataclass(frozen=True)
class Unpack:
    """A forward pre-hook that takes the inputs of a batch apart. A call with several arguments stays as it is.

    Attributes:
        names: the keys of a mapping that become arguments; None: the inputs are a tuple.
    """

    names: tuple[str, ...] | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the call."""
        if len(args) != 1 or kwargs:
            return None
        (inputs,) = args
        if self.names is not None:
            return ((), {name: inputs[name] for name in self.names}) if isinstance(inputs, Mapping) else None
        return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else None


def install_call(model: nn.Module, inputs: Any) -> str | None:
    """Decide how a model is called with such inputs, and install it; return a note, None for a single tensor.

    Args:
        model: the model. Of an `nn.Sequential`, the first module takes the inputs.
        inputs: the inputs of a batch.
    """
    if isinstance(inputs, torch.Tensor):
        return None
    unpack, reason = choose_call(model, inputs)
    if unpack is not None:
        _first_module(model).register_forward_pre_hook(unpack, prepend=True, with_kwargs=True)
    return f"the model is called as {describe_call(model, inputs)}" + (f": {reason}" if reason else "")


def describe_call(model: nn.Module, inputs: Any) -> str:
    """Return how a model is called, with the shapes of its arguments, for messages."""
    hooks = _first_module(model)._forward_pre_hooks.values()
    unpack = next((hook for hook in hooks if isinstance(hook, Unpack)), None)
    if unpack is None:
        return f"model(inputs) with inputs {describe(inputs)}"
    if unpack.names is None:
        return f"model(*inputs) with {', '.join(map(describe, inputs))}"
    named = [f"{name}: {describe(inputs[name])}" for name in unpack.names if name in inputs]
    return f"model(**inputs) with {', '.join(named)}"


def choose_call(model: nn.Module, inputs: Any) -> tuple[Unpack | None, str]:
    """Return the hook that takes the inputs apart, or None and the reason why the model gets them whole."""
    first = _first_module(model)
    if isinstance(inputs, Samples) or not isinstance(inputs, Mapping | tuple | list):
        return None, ""
    if isinstance(first, torch.jit.ScriptModule):
        return None, "a scripted model takes the inputs whole"
    try:
        parameters = [*inspect.signature(first.forward).parameters.values()]
    except (TypeError, ValueError):  # compiled code has no signature
        return None, "its forward has no signature"
    if isinstance(inputs, Mapping):
        return _by_name(parameters, inputs)
    return _by_position(parameters, len(inputs))


def _by_name(parameters: list[inspect.Parameter], inputs: Mapping[Any, Any]) -> tuple[Unpack | None, str]:
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    missing = [name for name, p in named.items() if p.default is p.empty and name not in inputs]
    missing += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if missing:
        return None, f"forward needs {missing[0]!r}, which is not a key"
    tensors = [key for key, value in inputs.items() if tensors_in(value)]
    unknown = [key for key in tensors if key not in named and not (takes_any and isinstance(key, str))]
    if unknown:
        return None, f"forward does not take {unknown[0]!r}"
    return Unpack(tuple(key for key in inputs if key in named or key in tensors)), ""


def _by_position(parameters: list[inspect.Parameter], count: int) -> tuple[Unpack | None, str]:
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) == 1 and not takes_any:
        return None, ""
    if required <= count and (takes_any or count <= len(positional)):
        return Unpack(), ""
    expected = f"{required} to {len(positional)}" if required < len(positional) else str(required)
    return None, f"forward takes {expected} arguments, not {count}"


def _first_module(model: nn.Module) -> nn.Module:
    """Return the module that takes the inputs: of an `nn.Sequential`, its first."""
    while type(model).forward is nn.Sequential.forward and isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    return model

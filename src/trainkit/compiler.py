"""torch's compiler: not imported until something compiles, and asked by name."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainkit.errors import ConfigError

NAME = "torch._dynamo"


class Idle(types.ModuleType):
    """Stands in for the compiler's module, which every optimizer imports to tell it to stay away.

    That import takes nearly as long as torch's own. What is asked of it without compiling is answered
    here; anything else brings in the real one.
    """

    def __init__(self) -> None:
        super().__init__(NAME)
        self.left_alone: list[Any] = []

    def graph_break(self, *_: Any) -> None:
        """There is no graph to break."""

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """There is nothing to disable; the compiler is asked again once it is there."""
        self.left_alone.append(function)
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # those that only look at every module there is
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
            vars(torch).pop("_dynamo", None)
            for function in self.left_alone:
                vars(function).pop("__dynamo_disable", None)
        return getattr(importlib.import_module(NAME), name)


def leave_idle() -> None:
    """Put the stand-in where the compiler would be, unless that is there already."""
    if NAME not in sys.modules:
        sys.modules[NAME] = torch._dynamo = Idle()


def compile_model(model: nn.Module, mode: str) -> None:
    """Let torch compile the model as it is first called; its parameters keep their names.

    Args:
        model: on its device.
        mode: default, reduce-overhead (CUDA graphs) or max-autotune, as torch.compile has them.

    Raises:
        ConfigError: there is no C++ compiler, which the CPU needs.
    """
    if all(param.device.type == "cpu" for param in model.parameters()):
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            cause = f"compile: this machine has no C++ compiler ({type(error).__name__})"
            raise ConfigError(cause, mend="install g++, or write compile=off") from error
    model.compile(mode=mode)

"""torch's compiler: asked by name, and not imported because an optimizer wants to tell it to stay away.

That import takes nearly as long as torch's own.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.core.errors import ConfigError

NAME = "torch._dynamo"
DISABLED = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")  # methods of optimizers, by torch


class Idle(types.ModuleType):
    """Stands in for the compiler's module while an optimizer steps: there is no graph to break."""

    def graph_break(self, *_: Any) -> None:
        """Nothing is compiled."""

    def __getattr__(self, name: str) -> Any:
        take_away()
        return getattr(importlib.import_module(NAME), name)


idle = Idle(NAME)


def put_in(*_: Any) -> None:
    """Let an import of the compiler find the stand-in, unless the compiler is there."""
    if NAME not in sys.modules:
        sys.modules[NAME] = torch._dynamo = idle


def take_away(*_: Any) -> None:
    """Let an import of the compiler import it."""
    if sys.modules.get(NAME) is idle:
        del sys.modules[NAME]
        vars(torch).pop("_dynamo", None)


def skip_dynamo(optimizer: Optimizer) -> Optimizer:
    """Let an optimizer step without importing the compiler."""
    optimizer.register_step_pre_hook(put_in)
    optimizer.register_step_post_hook(take_away)
    return optimizer


class Arrival:
    """Waits, as the first of Python's finders, for the compiler's import: its own marks are its own from then on."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Undo `leave_alone`, and leave the finding to others."""
        if name == NAME:
            sys.meta_path.remove(self)  # it finds nothing
            for function in _undecorated():
                vars(function).pop("__dynamo_disable", None)


def defer_dynamo() -> None:
    """Let optimizers be built, saved and restored without importing the compiler, until something else does."""
    if NAME not in sys.modules and not any(isinstance(finder, Arrival) for finder in sys.meta_path):
        sys.meta_path.insert(0, Arrival())
        for function in _undecorated():
            function.__dynamo_disable = function  # where torch keeps what the compiler made of it


def _undecorated() -> list[Any]:
    found = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in DISABLED]
    return [function for function in found if function is not None]


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
            raise ConfigError(cause, hint="install g++, or write compile=off") from error
    model.compile(mode=mode)

"""Model compilation, and a delay of the import of torch's compiler until something compiles.

The methods of torch's optimizers import `torch._dynamo`, which takes nearly as long as the import of torch itself.
They need it only to keep compiled code away from themselves. So two functions avoid the import:

- `skip_dynamo` puts a stand-in into `sys.modules` while an optimizer steps.
- `defer_dynamo` marks the other methods of optimizers as handled, until `torch._dynamo` is imported.

Both depend on internals of torch. They do nothing for versions of torch in which they were not verified.
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

DYNAMO = "torch._dynamo"
VERIFIED_TORCH = ((2, 11), (2, 15))  # the first and the last version
# The methods of optimizers that torch decorates with `torch._disable_dynamo`.
DISABLED_METHODS = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")


def is_verified_torch() -> bool:
    """Return whether the delay of the import was verified with the installed torch."""
    first, last = VERIFIED_TORCH
    major, minor, *_ = torch.__version__.split(".")
    return first <= (int(major), int(minor)) <= last


# ------------------------------------------------------------------------- while an optimizer steps


class DynamoStandIn(types.ModuleType):
    """A stand-in for `torch._dynamo`; any attribute but `graph_break` imports the real module."""

    def graph_break(self, *_: Any) -> None:
        """Do nothing, because nothing is compiled."""

    def __getattr__(self, name: str) -> Any:
        remove_stand_in()
        return getattr(importlib.import_module(DYNAMO), name)


STAND_IN = DynamoStandIn(DYNAMO)


def insert_stand_in(*_: Any) -> None:
    """Put the stand-in into `sys.modules` unless `torch._dynamo` is imported already."""
    if DYNAMO not in sys.modules:
        sys.modules[DYNAMO] = torch._dynamo = STAND_IN


def remove_stand_in(*_: Any) -> None:
    """Remove the stand-in, so that the next import finds the real module."""
    if sys.modules.get(DYNAMO) is STAND_IN:
        del sys.modules[DYNAMO]
        vars(torch).pop("_dynamo", None)


def skip_dynamo(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer, whose steps do not import `torch._dynamo` from now on."""
    if is_verified_torch():
        optimizer.register_step_pre_hook(insert_stand_in)
        optimizer.register_step_post_hook(remove_stand_in)
    return optimizer


# ------------------------------------------------------------------ when optimizers are built or saved


class DynamoImportWatcher:
    """An import finder that undoes `defer_dynamo` when `torch._dynamo` is first imported."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Return None, so that the other finders find the module."""
        if name == DYNAMO:
            sys.meta_path.remove(self)
            for function in _undecorated_methods():
                vars(function).pop("__dynamo_disable", None)


def defer_dynamo() -> None:
    """Build, save and restore optimizers without an import of `torch._dynamo`, until something else imports it."""
    is_deferred = any(isinstance(finder, DynamoImportWatcher) for finder in sys.meta_path)
    if is_verified_torch() and DYNAMO not in sys.modules and not is_deferred:
        sys.meta_path.insert(0, DynamoImportWatcher())
        for function in _undecorated_methods():
            function.__dynamo_disable = function  # torch stores the function that dynamo has wrapped here


def _undecorated_methods() -> list[Any]:
    methods = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in DISABLED_METHODS]
    return [method for method in methods if method is not None]


# ------------------------------------------------------------------------------------- compilation


def compile_model(model: nn.Module, mode: str) -> None:
    """Compile the model at its first call; its parameters keep their names.

    Args:
        model: the model, on its device.
        mode: default, reduce-overhead (CUDA graphs) or max-autotune, as in torch.compile.

    Raises:
        ConfigError: the model is on the CPU, and there is no C++ compiler.
    """
    if all(param.device.type == "cpu" for param in model.parameters()):
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            cause = f"compile: this machine has no C++ compiler ({type(error).__name__})"
            raise ConfigError(cause, hint="install g++ or write compile=off") from error
    model.compile(mode=mode)

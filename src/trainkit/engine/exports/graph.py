"""Follow the computation of a model with `torch.export`, for every batch size, and explain why it fails."""

from __future__ import annotations

import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from trainkit.core.errors import ExportError
from trainkit.core.modes import evaluating
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.engine.exports.calls import TRACED, Call, Caller
from trainkit.training.carried import capture_carried, carrying_modules, reset_carried

WEIGHTS_HINT = "--format safetensors exports the weights without the code"
OWN_FILES = str(Path(__file__).parents[1])  # the frames of the exporters
TORCH_FILES = f"{Path(torch.__file__).parent}/"


def trace(caller: Caller) -> ExportedProgram:
    """Return the computation of a model as a graph whose batch size may change.

    Raises:
        ExportError: torch cannot follow the code of the model. The message names the line.
    """
    model, call = caller.model, caller.random(TRACED)
    try:
        with evaluating(model), preserve_rng(), quiet(), _hooks(caller):
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic_sizes(model, call))
    except Exception as error:
        raise explain(error, model) from error
    for module in program.graph_module.modules():  # the lines of the code, with the paths of this machine
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _hooks(caller: Caller) -> Iterator[None]:
    """Let the model prepare raw inputs if the export does so, and start each call without carried state.

    Models of transformers return no cache in the block, because torch.export accepts tensors only.
    """
    model, carrying, handles = caller.model, carrying_modules(caller.model), []
    caching = (module for module in model.modules() if getattr(getattr(module, "config", None), "use_cache", False))
    configs: list[Any] = [module.config for module in caching]
    for config in configs:
        config.use_cache = False
    reset_carried(carrying)
    states = [(inner, name) for inner, name, buffer, _ in capture_carried(carrying) if buffer is None]
    for inner, name in states:  # torch.export accepts no buffer that is None before a call and a tensor in it
        del inner._buffers[name]
        setattr(inner, name, None)
    if caller.prepares_inside:
        hook = lambda _, args, kwargs: (caller.prepare(args), caller.prepare(kwargs))  # noqa: E731
        handles.append(model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
    if carrying:
        handles.append(model.register_forward_pre_hook(lambda *_: reset_carried(carrying)))
        handles.append(model.register_forward_hook(lambda *_: reset_carried(carrying)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config in configs:
            config.use_cache = True
        for inner, name in states:
            delattr(inner, name)
            inner._buffers[name] = None


def dynamic_sizes(model: nn.Module, call: Call, name: Any = None) -> dict[str, Any]:
    """Return which sizes may change, as torch's exporters take it: the first dimension of each tensor.

    Args:
        model: the model.
        call: the arguments.
        name: how the exporter names the dimension.
    """
    sizes = {0: Dim("batch") if name is None else name}
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    return {key: _map_leaves(value, sizes) for key, value in bound.arguments.items()}


def _map_leaves(value: Any, sizes: dict[int, Any]) -> Any:
    """Return the structure of an argument, with `sizes` for each tensor and None for other values."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, sizes) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([_map_leaves(item, sizes) for item in value])
    return sizes if isinstance(value, torch.Tensor) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Show no warnings, logs and prints of torch's exporters, which describe internals of torch."""
    before, unread = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(unread), redirect_stderr(unread):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def explain(error: Exception, model: nn.Module) -> ExportError:
    """Return the error for a model whose code torch cannot follow, with the line of the code."""
    name, text = name_and_place(model), str(error).strip()
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        reason = "its code depends on the values of a tensor"
        hint = f"choose with torch.where or torch.cond instead of `if` and `for`; {WEIGHTS_HINT}"
    elif "specialized it to be a constant" in text or "Constraints violated" in text:
        reason = "its code depends on the batch size"
        hint = f"use x.shape[0] or -1 instead of a number, and no loop over the samples; {WEIGHTS_HINT}"
    else:
        first = (text or "no message").splitlines()[0]
        reason = f"torch.export cannot follow its code: {type(error).__name__}: {first}"
        hint = f"write the code with operations of torch; {WEIGHTS_HINT}"
    return ExportError("\n  ".join([f"model: {name} cannot be exported: {reason}", *model_line(error)]), hint=hint)


def model_line(error: BaseException) -> list[str]:
    """Return the innermost line of the traceback that is in the code of the model, not in torch."""
    frames = traceback.extract_tb(error.__traceback__)
    start = next((i for i, frame in enumerate(frames) if frame.filename.startswith(TORCH_FILES)), len(frames))
    found = [f for f in frames[start:] if not f.filename.startswith((OWN_FILES, TORCH_FILES, "<"))]
    return [f"{f.filename}, line {f.lineno}, in {f.name}: {f.line}" for f in found[-1:]]

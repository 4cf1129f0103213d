"""The lines of Python that load an export without trainkit, for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.config.schema import Node
from trainkit.config.targets import nodes_with_target
from trainkit.core.pytree import dtype_name
from trainkit.engine.exports.calls import Call
from trainkit.engine.exports.nodes import as_code

PACKAGES = ("torch", "torchvision", "timm", "trainkit", "transformers")


def load_onnx(file: str, call: Call) -> list[str]:
    """Return the code that runs an ONNX file on zeros.

    Args:
        file: the name of the file.
        call: a call of the model with a batch.
    """
    named = zip(call.names, call.tensors, strict=True)
    zeros = [f'"{name}": numpy.zeros({tuple(t.shape)}, "{dtype_name(t)}")' for name, t in named]
    return [
        "import numpy, onnxruntime",
        f'session = onnxruntime.InferenceSession("{file}")',
        f"inputs = {{{', '.join(zeros)}}}",
        "outputs = session.run(None, inputs)",
        "print(outputs[0].shape)",
    ]


def load_program(file: str, call: Call) -> list[str]:
    """Return the code that runs a program on zeros; see `load_onnx`."""
    return [
        "import torch",
        f'model = torch.export.load("{file}").module()',
        "with torch.no_grad():",
        f"    outputs = model({_arguments(call)})",
        "print(getattr(outputs, 'shape', outputs))",
    ]


def load_weights(file: str, call: Call | None, node: Node, *, lazy: bool) -> list[str]:
    """Return the code that builds a model and loads its weights; see `load_onnx`.

    Args:
        file: the name of the file.
        call: a call of the model with a batch; None if its inputs are not known.
        node: the config of the model.
        lazy: whether the model has lazy layers.
    """
    modules, model = as_code(node)
    code = [f"import {', '.join(sorted({'torch', *modules}))}"]
    code += [f"from safetensors.torch import {'load_file' if lazy else 'load_model'}"]
    code += [f"model = {model}.eval()"]
    code += [f'model.load_state_dict(load_file("{file}"))' if lazy else f'load_model(model, "{file}")']
    run = f"outputs = model({'' if call is None else _arguments(call)})"
    return [*code, f"{run}  # with torch.no_grad(), for speed" if call is not None else f"# {run}"]


def needed_code(node: Node) -> str:
    """Return which code of a user a model needs, for the card; '' if it needs packages only."""
    targets = [str(inner["_target_"]) for _, inner in nodes_with_target(node)]
    own = [target for target in targets if target.partition(".")[0] not in PACKAGES]
    return f"The lines need the code of {', '.join(f'`{target}`' for target in own)}." if own else ""


def _arguments(call: Call) -> str:
    named = [f"{key}={_zeros(value)}" for key, value in call.kwargs.items()]
    return ", ".join([*map(_zeros, call.args), *named])


def _zeros(value: Any) -> str:
    """Return code for an argument with zeros in place of its values."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
        return f"torch.zeros({', '.join(map(str, value.shape))}{dtype})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_zeros(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_zeros, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
    return repr(value)

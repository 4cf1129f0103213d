"""The config of a model as others can build it: without trainkit's wrappers, downloads and secrets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from trainkit.config.schema import UNNAMED, Node, named_nodes
from trainkit.config.settings import Settings
from trainkit.core.redaction import redact_by_key, redact_copies
from trainkit.runs.secrets import secrets_of

NEED_WEIGHTS = ("googlenet", "inception")  # models of torchvision whose layers depend on the argument `weights`


def plain_node(node: Node) -> Node:
    """Return the config of a model whose weights are loaded next.

    Low-rank adapters are merged into the weights, so their wrapper is left out. The builders of trainkit for
    torchvision and timm become those of the libraries, without a download of pretrained weights.
    """
    if node.get("_target_") == "trainkit.adapters.lora":
        return plain_node(node["model"])
    if node.get("_target_") == "trainkit.model_libraries.torchvision":
        return _of_torchvision(node)
    if node.get("_target_") == "trainkit.model_libraries.timm":
        rest = {key: value for key, value in node.items() if key not in ("_target_", "name", "pretrained")}
        return {"_target_": "timm.create_model", "model_name": node["name"], **rest}
    if "_target_" not in node:
        return {key: plain_node(value) if isinstance(value, dict) else value for key, value in node.items()}
    return node


def _of_torchvision(node: Node) -> Node:
    from torchvision import models

    given = {key: value for key, value in node.items() if key not in ("_target_", "weights") and value is not None}
    if str(node["name"]).startswith(NEED_WEIGHTS) and node.get("weights"):
        given["weights"] = node["weights"]
    if "weights_backbone" in inspect.signature(models.get_model_builder(node["name"])).parameters:
        given["weights_backbone"] = None
    return {"_target_": "torchvision.models.get_model", **given}


def without_secrets(node: Node, settings: Settings) -> Node:
    """Return the config of a model with each secret redacted, as in the files of a run."""
    redacted: Node = redact_copies(redact_by_key(node), secrets_of(settings.source))
    return redacted


def as_code(node: Node) -> tuple[list[str], str]:
    """Return the config of a model as Python code: the modules to import, and an expression."""
    modules: list[str] = []
    parts = named_nodes(node)
    if UNNAMED in parts:
        return modules, _expression(parts[UNNAMED], modules)
    modules.append("torch")
    named = [f"({name!r}, {_expression(part, modules)})" for name, part in parts.items()]
    modules.append("collections")
    return modules, f"torch.nn.Sequential(collections.OrderedDict([{', '.join(named)}]))"


def _expression(value: Any, modules: list[str]) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        modules.append(_module_of(value["_target_"]))
        given = [_expression(item, modules) for item in value.get("_args_", ())]
        given += [f"{key}={_expression(item, modules)}" for key, item in value.items() if not key.startswith("_")]
        if value.get("_partial_"):
            modules.append("functools")
            return f"functools.partial({', '.join([value['_target_'], *given])})"
        return f"{value['_target_']}({', '.join(given)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_expression(item, modules)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_expression(item, modules) for item in value)}]"
    return f"float('{value}')" if isinstance(value, float) and value - value != 0 else repr(value)


def _module_of(dotted: str) -> str:
    """Return the module in a dotted path. The model was built, so the module is imported."""
    parts = dotted.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in sys.modules), parts[0])

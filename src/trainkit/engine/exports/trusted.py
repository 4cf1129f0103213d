"""Decide which `_target_`s in a file may be called: a file that somebody sent must not choose code to execute."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from trainkit.config.targets import locate

# Modules whose classes of `nn.Module` may be built.
LIBRARIES = (
    *("torch.nn.modules.", "torchvision.models.", "timm.models.", "timm.layers."),
    *("trainkit.models", "trainkit.image_models"),
)
# Functions that build a model of a library by its name.
BUILDERS = ("torchvision.models.get_model", "timm.create_model")
PREFIXES = ("torch.nn.", "torchvision.models.", "timm.", "trainkit.")
DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)
# Arguments that name other files or addresses.
READING = re.compile(r"checkpoint_path|pretrained_cfg\w*|cache_dir|trust_\w+")
OPTIONS = ("_target_", "_args_", "_partial_")  # Hydra's keys


def find_untrusted(node: Any, path: str = "model") -> Iterator[str]:
    """Yield why the config of a model in a file may not be called as it is. Nothing is called.

    Args:
        node: the config.
        path: its key.
    """
    if isinstance(node, Mapping):
        if "_target_" in node and not is_trusted(node["_target_"]):
            yield f"{path}: it calls {node['_target_']}"
        for key, value in node.items():
            if not isinstance(key, str) or READING.fullmatch(key) or (key.startswith("_") and key not in OPTIONS):
                yield f"{path}.{key}: it may read other files or execute code"
            elif key != "_target_":
                yield from find_untrusted(value, f"{path}.{key}")
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from find_untrusted(value, f"{path}[{position}]")
    elif isinstance(node, str) and ("${" in node or ":" in node or "/" in node):
        yield f"{path}: it is {node[:80]!r}, which may name a file or an address"


def is_trusted(target: Any) -> bool:
    """Return whether a dotted path names a class of layers or models, or a builder, of a library that is known.

    The object itself decides: `torch.nn.modules.module.torch.hub.load` is a function of another module.
    """
    if not isinstance(target, str) or not DOTTED.fullmatch(target) or not target.startswith(PREFIXES):
        return False
    if target in BUILDERS:
        return True
    try:
        found = locate(target)
    except Exception:  # it does not exist: another check reports that
        return False
    if not str(getattr(found, "__module__", "")).startswith(LIBRARIES):
        return False
    return issubclass(found, nn.Module) if inspect.isclass(found) else _is_builder(found)


def _is_builder(found: Any) -> bool:
    """Return whether a function is registered as a model of torchvision or timm."""
    name = str(getattr(found, "__name__", ""))
    if str(found.__module__).startswith("torchvision.models."):
        from torchvision import models

        return name in models.list_models() and models.get_model_builder(name) is found
    if str(found.__module__).startswith("timm.models."):
        import timm

        return bool(timm.is_model(name)) and timm.model_entrypoint(name) is found
    return False

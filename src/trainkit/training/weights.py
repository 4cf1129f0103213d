"""Compare weights with a model that may differ from the model of the weights, and load them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.pytree import dtype_name
from trainkit.training.carried import match_saved_buffers

WRAPPERS = ("module.", "_orig_mod.", "model.")  # prefixes that DataParallel, torch.compile and trainers add
MISSING, UNEXPECTED, SHAPE, DTYPE = "missing", "unexpected", "other shape", "other dtype"
LAYOUT = "other layout"  # such as a sparse tensor, or a tensor of the device meta, which has no values


@dataclass(frozen=True)
class Mismatch:
    """A tensor that differs between the weights and the model.

    Attributes:
        name: the name of the tensor.
        kind: `MISSING`, `UNEXPECTED`, `SHAPE`, `DTYPE` or `LAYOUT`.
        weights: the shape of the tensor in the weights, or its dtype; `-` if the weights do not have it.
        model: the same for the model.
    """

    name: str
    kind: str
    weights: str
    model: str

    @property
    def option(self) -> str:
        """The key of `init_from` that allows the mismatch."""
        return "unexpected" if self.kind == UNEXPECTED else "missing"


@dataclass(frozen=True)
class Match:
    """The result of a comparison of weights with a model.

    Attributes:
        found: the tensors that fit the model, by their names in the model.
        mismatches: all other tensors.
        notes: the changes that made the names and dtypes fit.
    """

    found: dict[str, Any]
    mismatches: list[Mismatch]
    notes: list[str]

    def load_into(self, model: nn.Module) -> None:
        """Copy the tensors that fit into the model. All other tensors of the model stay as they are."""
        model.load_state_dict(self.found, strict=False)


def match_weights(model: nn.Module, weights: Mapping[str, Any]) -> Match:
    """Compare weights with a model.

    A prefix that a wrapper has added to all names is removed. A plain weight is also found if the model has
    parametrized it. If the model has tied a tensor, one of its names is enough.
    """
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    weights, notes = _without_wrappers(weights, own)
    weights = _with_parametrized_names(weights, own)
    match_saved_buffers(model, weights)
    own = model.state_dict(keep_vars=True)  # again, because the buffers may have changed
    found: dict[str, Any] = {}
    mismatches: list[Mismatch] = []
    for name, value in own.items():
        kind = _difference(value, weights[name]) if name in weights else MISSING
        if kind is None:
            found[name] = weights[name]
        else:
            mismatches.append(Mismatch(name, kind, _describe(weights.get(name), kind), _describe(value, kind)))
    loaded = {id(own[name]) for name in found if isinstance(own[name], Tensor)}
    mismatches = [item for item in mismatches if item.kind != MISSING or id(own[item.name]) not in loaded]  # tied
    unexpected = {name: value for name, value in weights.items() if name not in own}
    mismatches += [Mismatch(name, UNEXPECTED, _describe(value, UNEXPECTED), "-") for name, value in unexpected.items()]
    converted = sum(isinstance(own[name], Tensor) and own[name].dtype != value.dtype for name, value in found.items())
    notes += [f"{converted} of the tensors have another precision, and are converted"] if converted else []
    return Match(found, mismatches, notes)


def matching_names(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names that a pattern matches completely, as the name selector of param groups does."""
    return {name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)}


def patterns_for(names: Sequence[str]) -> list[str]:
    """Return a few patterns that match all of the names. They have the form of the name selector of param groups."""
    plain = [name for name in names if ".parametrizations." not in name]
    if len(plain) < len(names):
        return [*(patterns_for(plain) if plain else []), r".*\.parametrizations\..*"]
    for depth in (None, 1):  # the whole path of a module, else its first part
        patterns = list(dict.fromkeys(_pattern_of(name, depth) for name in names))
        if len(patterns) <= 4:
            return patterns
    return [".*"]


def _pattern_of(name: str, depth: int | None) -> str:
    path = name.split(".")[:-1][:depth]
    return re.escape(".".join(path)) + r"\..*" if path else re.escape(name)


def differing_prefix(weights: Sequence[str], own: Sequence[str]) -> str:
    """Return which prefix separates names of weights from names of the model; '' if no prefix does."""
    for name in weights:
        for other in own:
            if name.endswith(f".{other}"):
                prefix = name.removesuffix(other)
                matching = {key for key in weights if key.startswith(prefix) and key.removeprefix(prefix) in own}
                return f"{len(matching)} more names match without the prefix {prefix!r} of the weights"
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                matching = {key for key in weights if prefix + key in own}
                return f"{len(matching)} more names match with the prefix {prefix!r} of the model"
    return ""


def nan_names(weights: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that contain NaN."""
    dense = {
        name: value for name, value in weights.items() if isinstance(value, Tensor) and value.layout == torch.strided
    }
    return [name for name, value in dense.items() if value.is_floating_point() and bool(value.isnan().any())]


def _without_wrappers(weights: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the weights without the prefixes of wrappers, and a note about each prefix.

    Args:
        weights: the weights, by name.
        own: the tensors of the model, by name.
    """
    named, notes = dict(weights), []
    found_prefix = True
    while found_prefix:  # wrappers may be nested
        found_prefix = False
        for prefix in WRAPPERS:
            is_own = any(name.startswith(prefix) for name in own)
            if named and not is_own and all(name.startswith(prefix) for name in named):
                named = {name.removeprefix(prefix): value for name, value in named.items()}
                notes.append(f"the prefix {prefix!r} of all names is removed")
                found_prefix = True
    return named, notes


def _with_parametrized_names(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights, each plain weight under the name that torch gives it when the model parametrizes it."""
    named = dict(weights)
    for name in own:
        plain = re.sub(r"\.?parametrizations\.(\w+)\.original$", r".\1", name).lstrip(".")
        if name not in named and plain in named and plain not in own:
            named[name] = named.pop(plain)
    return named


def _difference(own: Any, given: Any) -> str | None:
    """Return how a value differs from the value of the model; None if it can be copied into the model."""
    if not isinstance(own, Tensor) or not isinstance(given, Tensor):
        return None if isinstance(own, Tensor) == isinstance(given, Tensor) else DTYPE
    if own.shape != given.shape:
        return SHAPE
    if own.layout != given.layout or given.is_meta:
        return LAYOUT
    both_float = own.is_floating_point() and given.is_floating_point()
    return None if both_float or own.dtype == given.dtype else DTYPE


def _describe(value: Any, kind: str) -> str:
    if value is None:
        return "-"
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = dtype_name(value)
    shape = "x".join(map(str, value.shape)) or "()"
    layout = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
    return f"{shape} {dtype}" if kind == DTYPE else f"{shape} {layout}" if kind == LAYOUT else shape

"""Load weights into a model that may differ from the model that they were trained in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainkit.training.carried import match_saved_buffers

WRAPPERS = ("module.", "_orig_mod.", "model.")  # prefixes that DataParallel, torch.compile and trainers add
MISSING, UNEXPECTED, SHAPE, DTYPE = "missing", "unexpected", "other shape", "other dtype"


@dataclass(frozen=True)
class Mismatch:
    """A tensor that differs between weights and a model. `weights` and `model` describe it, `-` if it is not there."""

    name: str
    kind: str
    weights: str
    model: str


@dataclass(frozen=True)
class Match:
    """Weights compared with a model.

    Attributes:
        found: the tensors that fit, by the names of the model.
        mismatches: all other tensors.
        notes: what was done to make the names and dtypes fit.
    """

    found: dict[str, Any]
    mismatches: list[Mismatch]
    notes: list[str]

    def load_into(self, model: nn.Module) -> None:
        """Copy the tensors that fit into the model; all other tensors of the model stay as they are."""
        model.load_state_dict(self.found, strict=False)


def match_weights(model: nn.Module, weights: Mapping[str, Any]) -> Match:
    """Compare weights with a model.

    A prefix that a wrapper has added to each name is removed. A weight that the model computes from parametrizations
    is the original of these. One name of a tied tensor is enough.
    """
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    named, notes = _without_wrappers(weights, own)
    for name in own:
        plain = re.sub(r"\.?parametrizations\.(\w+)\.original$", r".\1", name).lstrip(".")
        if name not in named and plain in named and plain not in own:
            named[name] = named.pop(plain)
    match_saved_buffers(model, named)
    own = model.state_dict(keep_vars=True)
    found, mismatches, converted = {}, [], 0
    for name, value in own.items():
        kind = _difference(value, named[name]) if name in named else MISSING
        if kind is None:
            found[name] = named[name]
            converted += isinstance(value, Tensor) and value.dtype != named[name].dtype
        else:
            mismatches.append(Mismatch(name, kind, _describe(named.get(name), kind), _describe(value, kind)))
    loaded = {id(own[name]) for name in found if isinstance(own[name], Tensor)}
    mismatches = [item for item in mismatches if item.kind != MISSING or id(own[item.name]) not in loaded]
    mismatches += [Mismatch(n, UNEXPECTED, _describe(v, UNEXPECTED), "-") for n, v in named.items() if n not in own]
    notes += [f"{converted} of the tensors have another precision, and are converted"] if converted else []
    return Match(found, mismatches, notes)


def matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names that a pattern matches as a whole, as the name selector of param groups does."""
    return {name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)}


def patterns_for(names: Sequence[str]) -> list[str]:
    """Return a few patterns, in the form of the name selector of param groups, that match all of the names."""
    if all(".parametrizations." in name for name in names):
        return [r".*\.parametrizations\..*"]
    for depth in (None, 1):  # the whole path of a module, else its first part
        patterns = list(dict.fromkeys(_pattern_of(name, depth) for name in names))
        if len(patterns) <= 4:
            return patterns
    return [".*"]


def _pattern_of(name: str, depth: int | None) -> str:
    path = name.split(".")[:-1][:depth]
    return re.escape(".".join(path)) + r"\..*" if path else re.escape(name)


def _without_wrappers(weights: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the weights without the prefixes of wrappers, and a note about each prefix."""
    named, notes = dict(weights), []
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            is_own = any(name.startswith(prefix) for name in own)
            if named and not is_own and all(name.startswith(prefix) for name in named):
                named = {name.removeprefix(prefix): value for name, value in named.items()}
                notes.append(f"the prefix {prefix!r} of all names is removed")
                stripped = True
    return named, notes


def _difference(own: Any, given: Any) -> str | None:
    """Return how a given value differs from that of the model; None if it can be copied."""
    if not isinstance(own, Tensor) or not isinstance(given, Tensor):
        return None if isinstance(own, Tensor) == isinstance(given, Tensor) else DTYPE
    if own.shape != given.shape:
        return SHAPE
    both_float = own.is_floating_point() and given.is_floating_point()
    return None if both_float or own.dtype == given.dtype else DTYPE


def _describe(value: Any, kind: str) -> str:
    if value is None:
        return "-"
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    shape = "x".join(map(str, value.shape)) or "()"
    return f"{shape} {dtype}" if kind == DTYPE else shape

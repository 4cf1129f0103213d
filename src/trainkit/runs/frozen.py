"""Checkpoints without the frozen weights: `checkpoint.weights=trainable`.

The config builds the frozen weights again: from its seed, pretrained weights or `init_from`. The digest in a
checkpoint shows whether these weights are the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from trainkit.core.errors import CheckpointError
from trainkit.runs.snapshot import digest
from trainkit.training.state import State

AVERAGE = "module.model."  # the prefix of the model's names in the moving average (`AveragedModel`, `ModuleDict`)


class FrozenWeights:
    """The parameters of a model that no optimizer updates. Checkpoints hold their names and their digest.

    Args:
        state: the state of a training that is about to start.
    """

    def __init__(self, state: State) -> None:
        self.model, self.names = state.objects.model, frozen_names(state)
        self.digest, self.versions = digest_of(self.model, self.names), self._versions()

    def remove_from(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a captured state without the frozen weights.

        Raises:
            CheckpointError: the frozen weights have changed since the start, so the config could not build them again.
        """
        versions = self._versions()
        if versions != self.versions and digest_of(self.model, self.names) != self.digest:
            changed = next(name for name in self.names if versions[name] != self.versions[name])
            cause = f"checkpoint.weights=trainable: {changed} is frozen, but something has changed it"
            raise CheckpointError(cause, hint="write checkpoint.weights=all")
        self.versions = versions
        removed = {*self.names, *(AVERAGE + name for name in self.names)}
        modules = {key: _selected(saved[key], removed) for key in ("model", "ema")}
        return {**saved, **modules, "frozen": {"names": self.names, "sha256": self.digest}}

    def _versions(self) -> dict[str, tuple[int, int]]:
        """Return the address and the version of each frozen parameter. Most changes of a parameter change these."""
        params = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: (params[name].data_ptr(), params[name]._version) for name in self.names}


def frozen_names(state: State) -> list[str]:
    """Return the names of the model's parameters that no optimizer updates."""
    trained = {id(param) for param in state.objects.parameters}
    named = state.objects.model.named_parameters(remove_duplicate=False)
    return [name for name, param in named if id(param) not in trained]


def digest_of(model: nn.Module, names: Iterable[str]) -> str:
    """Return the SHA-256 over the names and the values of some parameters of a model."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return digest({"frozen": [[name, params[name]] for name in names if name in params]})


def lacks_frozen(saved: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint lacks the frozen weights."""
    return saved.get("frozen") is not None


def check_frozen(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Compare the frozen weights that the config has built with those of a checkpoint that lacks them.

    Raises:
        CheckpointError: they differ.
    """
    frozen = saved["frozen"]
    names = frozen.get("names") if isinstance(frozen, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("the checkpoint does not list its frozen weights", hint="use another checkpoint")
    if digest_of(model, names) != frozen.get("sha256"):
        cause = "the frozen weights that the config builds are not those of this run, and its checkpoints lack them"
        hint = "restore what they come from: the file or run of init_from, pretrained weights, the model's code"
        raise CheckpointError(cause, hint=hint)


def with_frozen(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that has the frozen weights of the model, if the checkpoint lacks its own."""
    if not lacks_frozen(saved):
        return dict(saved)
    params = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name: params[name].detach() for name in saved["frozen"]["names"] if name in params}
    whole = {"model": _merged(saved["model"], frozen)}
    if saved["ema"] is not None:  # the average of a constant is this constant
        whole["ema"] = _merged(saved["ema"], {AVERAGE + name: value for name, value in frozen.items()})
    return {**{key: value for key, value in saved.items() if key != "frozen"}, **whole}


def _selected(content: Mapping[str, Any] | None, removed: set[str]) -> Any:
    kept = None if content is None else OrderedDict((k, v) for k, v in content.items() if k not in removed)
    return _with_metadata(kept, content)


def _merged(content: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    return _with_metadata(OrderedDict({**content, **more}), content)


def _with_metadata(content: Any, original: Any) -> Any:
    """Return a state dict with the metadata of another, in which torch stores the versions of layers."""
    if content is not None and hasattr(original, "_metadata"):
        content._metadata = original._metadata
    return content

"""From `data.inputs`, `data.targets` and `data.collate` to the form of samples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from trainkit.build.instantiate import call_target, import_function
from trainkit.config.schema import COLLATES, Node
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError
from trainkit.data.form import SampleForm
from trainkit.losses import FromModel


def build_form(settings: Settings) -> SampleForm:
    """Build the form of the samples.

    Raises:
        ConfigError: `data.collate` is not a function of a list of samples.
        UserCodeError: `data.collate` raised an error.
    """
    data = settings.data
    collate = None if data.collate is None else build_collate(data.collate)
    from_model = locate(settings.loss["_target_"]) is FromModel  # the model needs the targets, too
    return SampleForm(data.inputs, data.targets, targets_too=from_model, collate=collate)


def build_collate(node: str | Node) -> Callable[[list[Any]], Any]:
    """Build a function that makes a batch of a list of samples.

    A class is called with the arguments of the node, and its object is the function. A function gets the list of
    samples first. If the config gives all of its arguments, it must return the function instead.
    """
    if isinstance(node, str):
        node = {"_target_": COLLATES.get(node, node)}
        import_function(node["_target_"], "data.collate")
    target = locate(node["_target_"])
    takes_samples = not inspect.isclass(target) and _needs_argument(target, node)

    def give_arguments(*arguments: Any, **keywords: Any) -> Any:
        given = functools.partial(target).keywords  # of a partial function, which Hydra repeats
        keywords = {key: value for key, value in keywords.items() if key not in given}
        return functools.partial(target, *arguments, **keywords) if keywords or arguments else target

    collate = call_target(node, "data.collate", give_arguments if takes_samples else None)
    if not callable(collate):
        cause = f"data.collate: {node['_target_']} makes a {type(collate).__name__}, which cannot be called"
        raise ConfigError(cause, hint="name a function of the list of samples, such as data.collate=pad")
    function: Callable[[list[Any]], Any] = collate
    return function


def _needs_argument(function: Any, node: Node) -> bool:
    """Return whether a function has a positional argument without a value: the list of samples."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a compiled function has no signature
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty and p.name not in node for p in parameters)

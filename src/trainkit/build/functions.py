"""Build a function that trainkit calls: a collate function or a custom step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from trainkit.build.instantiate import call_target, import_function
from trainkit.config.schema import Node
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError


def build_function(node: str | Node, path: str, names: Mapping[str, str] = {}) -> Callable[..., Any]:
    """Build a function that trainkit calls with its own arguments, such as the list of samples.

    If the `_target_` is a class, the config gives the arguments of the class, and the object is the function. If the
    `_target_` is a function, the config gives further arguments of it. If the config gives all arguments, the
    `_target_` is called at once, and must return the function.

    Args:
        node: a dotted path, a short name, or a `_target_` with its arguments.
        path: the config key.
        names: the dotted paths of the short names.

    Raises:
        ConfigError: the result cannot be called.
        UserCodeError: the code that the path names raised an error.
    """
    if isinstance(node, str):
        node = {"_target_": names.get(node, node)}
        found = import_function(node["_target_"], path)
        if not callable(found):
            cause = f"{path}: {node['_target_']} is of type {type(found).__name__}, which cannot be called"
            raise ConfigError(cause, hint=f"write the dotted path of a function or a class: {path}=PATH")
        needed = _required_arguments(found) if inspect.isclass(found) else []
        if needed:
            arguments = ", ".join(f"{name}: …" for name in needed)
            cause = f"{path}: {node['_target_']} needs {', '.join(needed)}"
            raise ConfigError(cause, hint=f"write {path}='{{_target_: {node['_target_']}, {arguments}}}'")
    target = locate(node["_target_"])
    is_function = not inspect.isclass(target) and _needs_argument(target, node)

    def bind_arguments(*arguments: Any, **keywords: Any) -> Any:
        bound = functools.partial(target).keywords  # of a partial function, whose keywords Hydra passes again
        keywords = {key: value for key, value in keywords.items() if key not in bound}
        return functools.partial(target, *arguments, **keywords) if keywords or arguments else target

    function: Callable[..., Any] = call_target(node, path, bind_arguments if is_function else None)
    if not callable(function):
        cause = f"{path}: {node['_target_']} makes a {type(function).__name__}, which cannot be called"
        raise ConfigError(cause, hint=f"write the dotted path of a function: {path}=PATH")
    return function


def _required_arguments(target: type) -> list[str]:
    """Return the arguments of a class that have no default; none if its signature is unknown."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def _needs_argument(function: Any, node: Node) -> bool:
    """Return whether a function has a positional argument without a value, so that trainkit must pass it."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a compiled function has no signature
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty and p.name not in node for p in parameters)

"""The only place that calls a `_target_`. Its errors name the config key."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from trainkit.config.schema import Node
from trainkit.config.static_targets import find_missing_target
from trainkit.config.targets import locate
from trainkit.core.errors import ConfigError, TrainkitError, UserCodeError


def call_target(node: Node, path: str, target: Any = None, **extra: Any) -> Any:
    """Call a node's `_target_` with the node's arguments, and return the result.

    Args:
        node: the mapping with `_target_` and the arguments.
        path: the node's key in the config, for error messages.
        target: is called with the node's arguments instead of `_target_`, if given.
        extra: further arguments, which replace the node's arguments of the same name.

    Raises:
        UserCodeError: the call raised an error.
    """
    plain = {key: value for key, value in node.items() if key not in extra}
    try:
        made = instantiate(plain | {"_partial_": True}, _convert_="all")
        return (target or made.func)(*made.args, **made.keywords, **extra)
    except InstantiationException as error:
        raise UserCodeError(path, error.__cause__ or error) from error
    except TrainkitError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(path, error) from error


def import_function(dotted: str, path: str) -> Any:
    """Import and return the function at a dotted path.

    Raises:
        ConfigError: the path is wrong.
        UserCodeError: the module raised an error on import.
    """
    key = f"{path}={dotted}"
    problem = find_missing_target(dotted)
    if problem:
        raise ConfigError(f"{key}: {problem.cause}", hint=problem.hint)
    try:
        return locate(dotted)
    except Exception as error:
        raise UserCodeError(key, error) from error

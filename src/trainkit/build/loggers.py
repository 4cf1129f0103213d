"""Build the loggers that the config names, and check their methods."""

from __future__ import annotations

import inspect
from typing import Any

from trainkit.build.instantiate import call_target
from trainkit.config.schema import Node
from trainkit.core.errors import ConfigError
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place

# Method -> the arguments that it is called with. `runs.loggers.Logger` describes them.
METHODS = {"start": ["run"], "log_epoch": ["epoch", "values"], "finish": ["status", "why"]}


def build_logger(name: str, node: Node) -> Any:
    """Build a logger. It does not change the RNG states.

    Raises:
        ConfigError: the logger lacks a method, or a method cannot be called with its arguments.
        UserCodeError: the logger raised another error.
    """
    with preserve_rng():
        logger = call_target(node, f"logger.{name}")
    for method, arguments in METHODS.items():
        wanted = f"def {method}(self, {', '.join(arguments)})"
        found = getattr(logger, method, None)
        if not callable(found):
            cause = f"logger.{name}: {name_and_place(logger)} has no method {method}"
            raise ConfigError(cause, hint=f"write {wanted}")
        cause = f"logger.{name}: {name_and_place(logger, method)}: {method}"
        if inspect.iscoroutinefunction(found):
            raise ConfigError(f"{cause} is async, and would never run", hint=f"write {wanted}, without async")
        try:
            inspect.signature(found).bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{cause} is called with ({', '.join(arguments)}): {error}", hint=f"write {wanted}"
            ) from error
        except ValueError:  # compiled code has no signature
            continue
    return logger

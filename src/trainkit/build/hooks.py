"""Build the custom hooks that the config names, and check their methods."""

from __future__ import annotations

import inspect
from typing import Any

from trainkit.build.instantiate import call_target
from trainkit.config.schema import Node
from trainkit.core.errors import ConfigError
from trainkit.core.source import name_and_place
from trainkit.core.spelling import did_you_mean
from trainkit.training.hooks import EVENTS, arguments_of


def build_hook(name: str, node: Node) -> Any:
    """Build a user's hook.

    Raises:
        ConfigError: the hook has no method that the loop calls, or a method with an unknown name.
    """
    hook = call_target(node, f"hooks.{name}")
    methods = [name for name in dir(hook) if name.startswith("on_") and callable(getattr(hook, name))]
    unknown = [method for method in methods if method not in EVENTS]
    if unknown:
        raise ConfigError(f"hooks.{name}: {unknown[0]} is never called", hint=did_you_mean(unknown[0], EVENTS))
    for method in methods:
        arguments = arguments_of(method)
        if inspect.iscoroutinefunction(getattr(hook, method)):
            cause = f"hooks.{name}: {name_and_place(hook, method)}: {method} is async, and would never run"
            raise ConfigError(cause, hint=f"write def {method}, without async")
        try:
            inspect.signature(getattr(hook, method)).bind(*arguments)
        except TypeError as error:
            cause = f"hooks.{name}: {name_and_place(hook, method)}: {method} is called with ({', '.join(arguments)})"
            raise ConfigError(f"{cause}: {error}", hint=f"write def {method}(self, {', '.join(arguments)})") from error
        except ValueError:  # compiled code has no signature
            continue
    if hasattr(hook, "state_dict") and not hasattr(hook, "load_state_dict"):
        cause = f"hooks.{name}: {name_and_place(hook)} has state_dict, and no load_state_dict"
        raise ConfigError(cause, hint="write def load_state_dict(self, saved), which a resume calls after on_start")
    if not methods:
        cause = f"hooks.{name}: {type(hook).__name__} has no method that the loop calls"
        raise ConfigError(cause, hint=f"add one of {', '.join(EVENTS)}")
    return hook

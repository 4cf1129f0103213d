"""Import what a `_target_` names, and compare its arguments with its signature."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from trainkit.core.errors import Problem, UserCodeError
from trainkit.core.redaction import find_secrets
from trainkit.core.spelling import did_you_mean

NOT_STRINGS = ("int", "float", "bool")


def nodes_with_target(node: Any, path: str = "") -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping with a `_target_` at any depth, with its key path."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from nodes_with_target(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from nodes_with_target(value, f"{path}[{index}]")


def locate(dotted: str) -> Any:
    """Import and return the object at a dotted path.

    Raises:
        LookupError: an attribute is missing; the exception's argument is a `Problem`.
        Exception: any error that the module raises on import.
    """
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part) and inspect.ismodule(found):
            name = ".".join(parts[: index + 1])
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
        if not hasattr(found, part):
            owner = ".".join(parts[:index])
            public = [name for name in dir(found) if not name.startswith("_")]
            raise LookupError(Problem(f"there is no {part!r} in {owner}", did_you_mean(part, public, f"{owner}.")))
        found = getattr(found, part)
    return found


def find_wrong_arguments(
    path: str, node: Mapping[str, Any], call: Callable[..., Any], given: Iterable[str] = ()
) -> list[Problem]:
    """Return the arguments that are unknown, missing or of the wrong simple type for a `_target_`.

    Args:
        path: the node's key in the config, for the messages.
        node: the mapping with `_target_` and the arguments.
        call: the object at `_target_`.
        given: names of arguments that trainkit itself passes.
    """
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # compiled code may have no signature
        return []
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or _accepts_any_keyword(call)
    takes_any = takes_any and not _accepts_nothing(call)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    keys = [str(key) for key in node if not str(key).startswith("_")]
    problems = []
    for key in keys:
        if key in named:
            problems += _wrong_type(f"{path}.{key}", node[key], named[key].annotation)
        elif not takes_any:
            hint = did_you_mean(key, set(named) - {"self", *given}, f"{path}.")
            if key == "lr" and path.partition(".")[0] == "optim":  # from the root's lr
                hint = f"remove lr=VALUE, and give the optimizer's own argument: {path}.NAME=VALUE"
                problems.append(Problem(f"lr: {node['_target_']} has no argument 'lr'", hint))
                continue
            remove = f"to remove it write ~{path}.{key}"
            found = f"has no argument {key!r}" if named else "takes no arguments"
            cause = f"{path}.{key}: {node['_target_']} {found}"
            problems.append(Problem(cause, f"{hint}; {remove}" if hint else remove))
    if not node.get("_partial_"):
        positional = len(node.get("_args_") or ())
        required = [name for name, p in list(named.items())[positional:] if p.default is p.empty]
        problems += [
            Problem(f"{path}: {node['_target_']} needs the argument {name!r}", _how_to_add(path, name))
            for name in required
            if name not in keys and name not in given
        ]
    return problems


def _how_to_add(path: str, name: str) -> str:
    is_rate = name == "lr" and path.partition(".")[0] == "optim"
    return "write lr=VALUE" if is_rate else f"add +{path}.{name}=VALUE"


def _accepts_nothing(call: Any) -> bool:
    """Return whether a class has no own `__init__`, and inherits one that accepts no arguments.

    The signature of `torch.nn.Module.__init__` accepts any arguments, but the function raises an error.
    """
    if not inspect.isclass(call) or call.__new__ is not object.__new__ or type(call).__call__ is not type.__call__:
        return False
    if call.__init__ is object.__init__:
        return True
    torch = sys.modules.get("torch")  # a subclass of its Module has imported it
    is_module = torch is not None and call.__init__ is torch.nn.Module.__init__
    return is_module and not getattr(call, "call_super_init", False)


def _accepts_any_keyword(call: Any) -> bool:
    """Return whether an object accepts any keyword, although its signature does not say so.

    `functools.wraps` and `__signature__` hide the parameters of a function.
    """
    functions = [call]
    if inspect.isclass(call):
        functions = [f for f in (call.__new__, call.__init__) if f not in (object.__new__, object.__init__)]
    codes = [getattr(getattr(function, "__func__", function), "__code__", None) for function in functions]
    return bool(codes) and all(code is not None and code.co_flags & inspect.CO_VARKEYWORDS for code in codes)


def _wrong_type(path: str, value: Any, annotation: Any) -> list[Problem]:
    """Return the problem of a string where the signature says int, float or bool."""
    wanted = str(getattr(annotation, "__name__", annotation))
    if isinstance(value, str) and wanted in NOT_STRINGS:
        return [Problem(f"{path}={value}: must be of type {wanted}", f"write {path}=VALUE")]
    return []


def find_wrong_targets(config: Any) -> list[Problem]:
    """Import each `_target_` of a plain config; return what is wrong with the targets and their arguments."""
    problems: list[Problem] = []
    for path, node in nodes_with_target(config):
        given = arguments_given_by_trainkit(path)
        try:
            called = locate(node["_target_"])
        except (Exception, SystemExit) as error:
            key = f"{path}._target_={node['_target_']}"
            if isinstance(error, LookupError) and error.args and isinstance(error.args[0], Problem):
                problems.append(Problem(f"{key}: {error.args[0].cause}", error.args[0].hint))
            else:  # the module raised it on import
                problems += UserCodeError(key, error).problems
            continue
        if not callable(called):
            cause = f"{path}._target_={node['_target_']}: the object cannot be called"
            problems.append(Problem(cause, "write the dotted path of a class or a function"))
            continue
        if path == "loss" and (name := _only_parameter(called, node)):
            cause = f"loss: {node['_target_']} takes ({name}), and a loss is called with (outputs, targets)"
            problems.append(Problem(cause, f"add a parameter; a function that makes a loss needs +loss.{name}=VALUE"))
            continue
        if path == "loss" and is_loss_function(called, node):
            with suppress(TypeError, ValueError):  # a compiled function has no signature
                given = tuple(_positional_parameters(called))[:2]
        if path == "data.collate" and not inspect.isclass(called):
            with suppress(TypeError, ValueError):
                given = tuple(_positional_parameters(called))[:1]  # the list of samples
        if path in ("training_step", "evaluation_step") and not inspect.isclass(called):
            with suppress(TypeError, ValueError):
                given = (*tuple(_positional_parameters(called))[:4], "progress")  # model, inputs, targets, loss_fn
        if re.fullmatch(r"metrics\.[^.\[]+", path):
            if is_loss_function(called, node):
                problems.append(_function_as_metric(path, node["_target_"]))
                continue
            node = {key: value for key, value in node.items() if key != "on"}
        own = {key: value for key, value in node.items() if not (given == ("optimizer",) and key == "interval")}
        problems += find_wrong_arguments(path, own, called, given)
    secrets = set(find_secrets(config))
    return [problem.without(secrets) for problem in problems]


def _function_as_metric(path: str, dotted: str) -> Problem:
    """Return the problem of a function of (outputs, targets) as a metric: a mean of its batch values is not exact."""
    cause = f"{path}: {dotted} is a function, and a metric is an object with update, compute and reset"
    hint = f"{path}._target_=trainkit.metrics.Collected +{path}.function={dotted} calls it once, on all samples"
    return Problem(cause, f"write {hint}")


def arguments_given_by_trainkit(path: str) -> tuple[str, ...]:
    """Return the names of the arguments that trainkit passes to the `_target_` at a key path."""
    if re.fullmatch(r"optim(\.\w+)?", path):
        return ("params",)
    if re.fullmatch(r"scheduler(\.(?!lr_lambda|scale_fn)\w+)?(\.?schedulers(\.\w+|\[\d+\]))*", path):
        return ("optimizer",)
    if path == "data.sampler":
        return ("data_source", "dataset", "batch_size")
    return ()


def is_loss_function(target: Any, node: Mapping[str, Any]) -> bool:
    """Return whether a `_target_` under `loss` is a function of (outputs, targets), not a function that makes a loss.

    A loss function has two positional parameters without a default, which the config does not give.
    """
    if isinstance(target, type) or not callable(target):
        return False
    try:
        required = [name for name, p in _positional_parameters(target).items() if p.default is p.empty]
    except (TypeError, ValueError):  # a compiled function has no signature
        return True
    return bool(node.get("_partial_")) or len([name for name in required if name not in node]) >= 2


def _only_parameter(target: Any, node: Mapping[str, Any]) -> str:
    """Return the name of the only parameter of a function that the config does not give, else ''."""
    if isinstance(target, type) or node.get("_args_"):
        return ""
    try:
        names = [n for n, p in _positional_parameters(target).items() if p.default is p.empty and n not in node]
    except (TypeError, ValueError):  # a compiled function has no signature
        return ""
    return names[0] if len(names) == 1 else ""


def _positional_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}

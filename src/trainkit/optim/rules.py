"""The rules of param groups: their contents, and the parameters that they match.

A rule maps selectors and options to values. It matches each parameter that fulfils all its selectors:

- `name`: a regular expression for the whole name
- `module`: a path prefix, or a list of prefixes
- `type`: the class of the owning module, by name or dotted path (subclasses match too), or a list of classes
- `ndim`: the number of dimensions
- `layer`: a number or a list of numbers, as `model_layers` counts; -1 is the last layer

The options are those of the optimizer, and:

- `lr_mult`: multiplies lr
- `layer_decay`: multiplies lr by layer_decay ** (number of layers above), as in BEiT (https://arxiv.org/abs/2106.08254)
- `freeze`: true sets requires_grad to false and excludes the parameter from the optimizer; a number does not train the
  parameter in the first epochs
- `optimizer`: the name of the optimizer, if there are several
- `optional`: true allows that the rule has no effect
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean, nearest
from trainkit.optim.params import Param

SELECTORS = ("name", "module", "type", "ndim", "layer")
LIST_SELECTORS = ("module", "type", "layer")  # these accept several values
RULE_OPTIONS = ("lr_mult", "layer_decay", "freeze", "optimizer", "optional")  # not options of torch's optimizers
LR_OPTIONS = ("lr", "lr_mult", "layer_decay")
VALUE_TYPES = {"name": str, "module": str, "type": str, "ndim": int, "layer": int}
VALUE_TYPES |= {"optimizer": str, "optional": bool}
EXAMPLES = {str: "NAME", int: "1", bool: "true"}


@dataclass(frozen=True)
class OptimizerOptions:
    """The options of an optimizer that is not built yet.

    Attributes:
        defaults: each option with its value for parameters for which no rule sets it.
        accepts_any: whether the optimizer accepts further options, because its signature does not list them.
    """

    defaults: Mapping[str, Any]
    accepts_any: bool = False

    @classmethod
    def from_signature(cls, optimizer: Callable[..., Optimizer], configured: Mapping[str, Any]) -> OptimizerOptions:
        """Return the options in an optimizer's signature, with the configured values over the defaults."""
        try:
            parameters = list(inspect.signature(optimizer).parameters.values())
        except (TypeError, ValueError):  # compiled code may not have a signature
            return cls(dict(configured), accepts_any=True)
        variadic = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        defaults = {p.name: None if p.default is p.empty else p.default for p in named if p.name != "params"}
        return cls(defaults | dict(configured), accepts_any=variadic)

    def __contains__(self, name: str) -> bool:
        return self.accepts_any or name in self.defaults


# --------------------------------------------------------------------------------------- checks of a rule


def check_rule(name: str, rule: Any, optimizers: Mapping[str, OptimizerOptions]) -> Iterator[Problem]:
    """Yield the problems of a rule that do not depend on the model."""
    path = f"param_groups.{name}"
    if not isinstance(rule, Mapping):
        cause = f"{path}={rule!r}: a rule must be a mapping of selectors and options"
        yield Problem(cause, f"write {path}: {{module: NAME, lr_mult: 10}}")
        return
    if name == "default":
        yield Problem(f"{path}: this name is reserved for parameters that no rule sets", "choose another name")
    if re.search(r"[+|\[\]]", name):
        yield Problem(f"{path}: the characters + | [ ] are reserved for merged groups", "choose another name")
    yield from _check_option_names(path, rule, optimizers)
    yield from _check_learning_rate(path, rule)
    yield from _check_types(path, rule)
    yield from _check_optimizer(path, rule, optimizers)
    try:
        re.compile(str(rule.get("name", "")))
    except re.error as error:
        cause = f"{path}.name={rule['name']!r}: not a valid regular expression ({error})"
        yield Problem(cause, "write .* for any characters, \\. for a dot")


def _check_option_names(
    path: str, rule: Mapping[str, Any], optimizers: Mapping[str, OptimizerOptions]
) -> Iterator[Problem]:
    available = {key for options in optimizers.values() for key in options.defaults}
    names = set(rule) - set(SELECTORS)
    for key in sorted(names - set(RULE_OPTIONS)):
        if not any(key in options for options in optimizers.values()):
            close = nearest(key, {*SELECTORS, *RULE_OPTIONS, *available})
            have = "have" if len(optimizers) > 1 else "has"
            listing = f"{' and '.join(optimizers)} {have} {', '.join(sorted(available))}"
            more = f"{listing}; a rule also has {', '.join(RULE_OPTIONS)}"
            hint = f"did you mean {path}.{close}? {listing}" if close else more
            yield Problem(f"{path}.{key}: neither a selector nor an option of the optimizer", hint)
    if not set(rule) & set(SELECTORS):
        yield Problem(f"{path}: the rule does not have a selector", f"add one of {', '.join(SELECTORS)}")
    if not names - {"optional"}:
        yield Problem(f"{path}: the rule does not set an option", f"add an option, such as {path}.lr_mult=0.1")


def _check_learning_rate(path: str, rule: Mapping[str, Any]) -> Iterator[Problem]:
    given = [key for key in LR_OPTIONS if key in rule]
    if len(given) > 1:
        cause = f"{path}: {' and '.join(given)} set the same learning rate, expected one of them"
        yield Problem(cause, "keep one: lr is the rate, lr_mult a factor, layer_decay a factor for each layer")
    for key in sorted({*LR_OPTIONS, "weight_decay"} & set(rule)):
        value = rule[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            yield Problem(f"{path}.{key}={value!r}: must be a finite number of at least 0", f"write {path}.{key}=0.1")
    decay = rule.get("layer_decay")
    if isinstance(decay, int | float) and decay > 1:
        yield Problem(f"{path}.layer_decay={decay}: must be at most 1", f"write {path}.layer_decay=0.75")


def _check_types(path: str, rule: Mapping[str, Any]) -> Iterator[Problem]:
    for key, wanted in VALUE_TYPES.items():
        if key not in rule:
            continue
        values = as_list(rule[key]) if key in LIST_SELECTORS else [rule[key]]
        hint = f"write {path}.{key}={EXAMPLES[wanted]}"
        if not values:
            yield Problem(f"{path}.{key}=[]: the list is empty, expected one value or more", hint)
        for value in values:
            if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                yield Problem(f"{path}.{key}={value!r}: must be of type {wanted.__name__}", hint)
    freeze = rule.get("freeze", False)
    if not isinstance(freeze, bool) and not (isinstance(freeze, int) and freeze >= 1):
        hint = f"write {path}.freeze=true, or {path}.freeze=2 to train from the third epoch on"
        yield Problem(f"{path}.freeze={freeze!r}: must be true, false, or a number of epochs of at least 1", hint)


def _check_optimizer(
    path: str, rule: Mapping[str, Any], optimizers: Mapping[str, OptimizerOptions]
) -> Iterator[Problem]:
    name = rule.get("optimizer")
    if not isinstance(name, str) or name in optimizers:
        return
    if len(optimizers) > 1:
        hint = did_you_mean(name, optimizers, f"{path}.optimizer=")
    else:
        only = next(iter(optimizers))
        hint = f"there is one optimizer, {only}: delete {path}.optimizer, or give optim several named optimizers"
    yield Problem(f"{path}.optimizer={name}: not the name of an optimizer", hint)


# ------------------------------------------------------------------------------------ matching of parameters


def as_list(value: Any) -> list[Any]:
    """Return the values of a selector that accepts one value or a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def matches(rule: Mapping[str, Any], param: Param) -> bool:
    """Return whether a parameter fulfils all selectors of a rule."""
    return (
        ("name" not in rule or re.fullmatch(str(rule["name"]), param.name) is not None)
        and ("module" not in rule or any(param.name.startswith(f"{m}.") for m in as_list(rule["module"])))
        and ("type" not in rule or any(_is_type(param.owner, name) for name in as_list(rule["type"])))
        and ("ndim" not in rule or param.tensor.dim() == rule["ndim"])
        and ("layer" not in rule or bool({param.layer, -1 - param.height} & set(as_list(rule["layer"]))))
    )


def _is_type(module: nn.Module, name: str) -> bool:
    """Return whether a module is an instance of a class, given by the name of the class or a dotted path to it."""
    if "." not in name:
        return name in {cls.__name__ for cls in type(module).__mro__}
    try:
        return isinstance(module, pkgutil.resolve_name(name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return False


def suggest_selector(selectors: Mapping[str, Any], params: list[Param]) -> str:
    """Return a hint for selectors that match nothing: the nearest value for the first wrong selector."""
    paths = [param.name.split(".") for param in params]
    available = {
        "name": {param.name for param in params},
        "module": {".".join(path[:depth]) for path in paths for depth in range(1, len(path))},
        "type": {type(param.owner).__name__ for param in params},
        "ndim": {str(param.tensor.dim()) for param in params},
        "layer": {str(param.layer) for param in params},
    }
    wrong = [key for key in selectors if not any(matches({key: selectors[key]}, param) for param in params)]
    if not wrong:
        return "each selector matches a parameter, but no parameter matches all of them: remove a selector"
    key = wrong[0]
    if key == "name" and any(re.search(selectors["name"], param.name) for param in params):
        return f"name must match the whole name: write name: '.*{selectors['name']}.*'"
    return did_you_mean(str(as_list(selectors[key])[0]), available[key], f"{key}: ")

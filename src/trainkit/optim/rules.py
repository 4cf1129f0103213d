"""What a param-group rule may say, and which parameters it speaks of."""

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
OWN_OPTIONS = ("lr_mult", "layer_decay", "freeze", "optimizer", "optional")
RATE_OPTIONS = ("lr", "lr_mult", "layer_decay")
KINDS = {"name": str, "module": str, "type": str, "ndim": int, "layer": int}
KINDS |= {"freeze": bool, "optimizer": str, "optional": bool}
LISTS = ("module", "type", "layer")  # selectors that take several values


@dataclass(frozen=True)
class OptimizerOptions:
    """An optimizer's options before it is made, each with its value where no rule sets it.

    `takes_any` is for an optimizer whose signature does not tell which options it has.
    """

    defaults: Mapping[str, Any]
    takes_any: bool = False

    @classmethod
    def from_signature(cls, optimizer: Callable[..., Optimizer], configured: Mapping[str, Any]) -> OptimizerOptions:
        """What its signature says, and over it what the config does."""
        try:
            parameters = list(inspect.signature(optimizer).parameters.values())
        except (TypeError, ValueError):  # compiled code may have no signature
            return cls(dict(configured), takes_any=True)
        several = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        defaults = {p.name: None if p.default is p.empty else p.default for p in named if p.name != "params"}
        return cls(defaults | dict(configured), takes_any=several)

    def __contains__(self, name: str) -> bool:
        return self.takes_any or name in self.defaults


# -------------------------------------------------------------------------------- what a rule may say


def malformed(name: str, rule: Any, optimizers: Mapping[str, OptimizerOptions]) -> Iterator[Problem]:
    """What is wrong with a rule by itself, whatever the model is."""
    where = f"param_groups.{name}"
    if not isinstance(rule, Mapping):
        yield Problem(f"{where}={rule!r}: a rule is a mapping", f"write {where}: {{module: NAME, lr_mult: 10}}")
        return
    if name == "default":
        yield Problem(f"{where}: that name is the rest's, of what no rule decides", "choose another name")
    if re.search(r"[+|\[\]]", name):
        yield Problem(f"{where}: a name without + | [ ], which join names", "choose another name")
    known = {key for options in optimizers.values() for key in options.defaults}
    options = set(rule) - set(SELECTORS)
    for key in sorted(options - set(OWN_OPTIONS)):
        if not any(key in one for one in optimizers.values()):
            close = nearest(key, {*SELECTORS, *OWN_OPTIONS, *known})
            has = f"{' and '.join(optimizers)} {'have' if len(optimizers) > 1 else 'has'} {', '.join(sorted(known))}"
            hint = f"did you mean {where}.{close}? {has}" if close else f"{has}; a rule has {', '.join(OWN_OPTIONS)}"
            yield Problem(f"{where}.{key}: neither a selector nor an option of the optimizer", hint)
    if not set(rule) & set(SELECTORS):
        yield Problem(f"{where}: no selector", f"say which parameters: {', '.join(SELECTORS)}")
    if not options - {"optional"}:
        yield Problem(f"{where}: it sets nothing", f"give it an option, such as {where}.lr_mult=0.1")
    rates = [key for key in RATE_OPTIONS if key in rule]
    if len(rates) > 1:
        yield Problem(f"{where}: both {' and '.join(rates)}", "keep one: the rate in force is lr * lr_mult")
    for key in sorted({*RATE_OPTIONS, "weight_decay"} & options):
        if isinstance(rule[key], bool) or not isinstance(rule[key], int | float) or not 0 <= rule[key] < float("inf"):
            yield Problem(f"{where}.{key}={rule[key]!r}: must be a number of at least 0", f"write {where}.{key}=0.1")
    if isinstance(rule.get("layer_decay"), int | float) and rule["layer_decay"] > 1:
        yield Problem(
            f"{where}.layer_decay={rule['layer_decay']}: must be at most 1", f"write {where}.layer_decay=0.75"
        )
    yield from _of_wrong_type(where, rule)
    if isinstance(rule.get("optimizer"), str) and rule["optimizer"] not in optimizers:
        one = f"there is one optimizer, {next(iter(optimizers))}; name several under optim, or delete {where}.optimizer"
        hint = did_you_mean(rule["optimizer"], optimizers, f"{where}.optimizer=") if len(optimizers) > 1 else one
        yield Problem(f"{where}.optimizer={rule['optimizer']}: there is none of that name", hint)
    try:
        re.compile(str(rule.get("name", "")))
    except re.error as error:
        yield Problem(
            f"{where}.name={rule['name']!r}: no regular expression ({error})", "write .* for anything, \\. for a dot"
        )


def _of_wrong_type(where: str, rule: Mapping[str, Any]) -> Iterator[Problem]:
    for key, kind in KINDS.items():
        values = listed(rule[key]) if key in LISTS and key in rule else [rule[key]] if key in rule else []
        if key in rule and not values:
            yield Problem(f"{where}.{key}=[]: it names nothing", f"write {where}.{key}=VALUE")
        for value in values:
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                cause = f"{where}.{key}={value!r}: must be of type {kind.__name__}"
                yield Problem(cause, f"write {where}.{key}=VALUE")


def listed(value: Any) -> list[Any]:
    """A selector's values, of which there may be one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_type(owner: nn.Module, name: str) -> bool:
    """Whether a module is of a class, given by its name or by any dotted path to it."""
    if "." not in name:
        return name in {cls.__name__ for cls in type(owner).__mro__}
    try:
        return isinstance(owner, pkgutil.resolve_name(name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return False


def matches(rule: Mapping[str, Any], param: Param) -> bool:
    """Whether all of a rule's selectors hold for a parameter."""
    return (
        ("name" not in rule or re.fullmatch(str(rule["name"]), param.name) is not None)
        and ("module" not in rule or any(param.name.startswith(f"{m}.") for m in listed(rule["module"])))
        and ("type" not in rule or any(_is_type(param.owner, name) for name in listed(rule["type"])))
        and ("ndim" not in rule or param.tensor.dim() == rule["ndim"])
        and ("layer" not in rule or bool({param.layer, -1 - param.height} & set(listed(rule["layer"]))))
    )


def nearest_names(selectors: Mapping[str, Any], params: list[Param]) -> str:
    """The nearest name for the selector that matches nothing by itself."""
    parts = [param.name.split(".") for param in params]
    among = {
        "name": {param.name for param in params},
        "module": {".".join(part[:depth]) for part in parts for depth in range(1, len(part))},
        "type": {type(param.owner).__name__ for param in params},
        "ndim": {str(param.tensor.dim()) for param in params},
        "layer": {str(param.layer) for param in params},
    }
    alone = [key for key in selectors if not any(matches({key: selectors[key]}, param) for param in params)]
    if not alone:
        return "each selector matches some parameter, but none matches all of them: drop one"
    if alone[0] == "name" and any(re.search(selectors["name"], param.name) for param in params):
        return f"it must match the whole name: name: '.*{selectors['name']}.*'"
    return did_you_mean(str(listed(selectors[alone[0]])[0]), among[alone[0]], f"{alone[0]}: ")

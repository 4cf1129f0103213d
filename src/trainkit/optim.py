"""Parameters to param groups by rule: the first that matches a parameter and sets a field decides it."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainkit.errors import ConfigError, Problem, did_you_mean

SELECTORS = ("name", "module", "type", "ndim")
OWN_OPTIONS = ("lr_mult", "freeze", "optional")
KINDS = {"name": str, "module": str, "type": str, "ndim": int, "freeze": bool, "optional": bool}


@dataclass
class Param:
    """A parameter under one of its names (a tied one has several), and what the rules decide for it."""

    name: str
    tensor: nn.Parameter
    owner: nn.Module
    options: dict[str, Any] = field(default_factory=dict)
    decided_by: dict[str, str] = field(default_factory=dict)

    @property
    def frozen(self) -> bool:
        """Whether it takes no part in training."""
        return not self.tensor.requires_grad or bool(self.options.get("freeze"))


@dataclass
class Group:
    """Parameters that share every option."""

    name: str
    params: list[Param]
    options: dict[str, Any]

    def for_optimizer(self) -> dict[str, Any]:
        """What `torch.optim` takes for this group."""
        names = {"name": self.name, "param_names": [param.name for param in self.params]}
        return {"params": [param.tensor for param in self.params], **self.options, **names}


def named_params(model: nn.Module, loss_fn: nn.Module | None = None) -> list[Param]:
    """Every parameter of the model, and of the loss as `loss.*`, under each of its names."""
    found = []
    for prefix, root in (("", model), ("loss.", loss_fn)):
        for path, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
                found.append(Param(prefix + (f"{path}.{leaf}" if path else leaf), tensor, module))
    return found


def options_of(optimizer: Callable[..., Optimizer]) -> set[str] | None:
    """The options a param group of this optimizer may set; None if its signature takes anything."""
    try:
        parameters = list(inspect.signature(optimizer).parameters.values())
    except (TypeError, ValueError):  # compiled code may have no signature
        return None
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return None
    return {p.name for p in parameters} - {"params"}


def resolve(params: list[Param], rules: Mapping[str, Any], lr: float | None, known: set[str] | None) -> list[Group]:
    """Groups out of rules, in the order of the rules that decide them; freezes what they freeze.

    A rule has selectors, of which all must hold (`name`: a regular expression for the whole name;
    `module`: a path prefix; `type`: the class of the owning module, by name or dotted path,
    subclasses too; `ndim`), and options: any of the optimizer's, `lr_mult`, `freeze`, `optional`.

    Args:
        params: from `named_params`; their `options` and `decided_by` are filled in.
        rules: name to rule.
        lr: the learning rate that `lr_mult` multiplies; None leaves it to the optimizer.
        known: the optimizer's options, from `options_of`.

    Raises:
        ConfigError: everything that is wrong with the rules.
    """
    problems: list[Problem] = []
    for name, rule in rules.items():
        wrong = [*_malformed(name, rule, lr, known)]
        problems += wrong or _apply(name, rule, params)
    problems += _ties(params)
    if problems:
        raise ConfigError(*problems)
    for param in params:
        if param.options.pop("freeze", False):
            param.tensor.requires_grad_(False)
        if "lr_mult" in param.options:
            param.options["lr"] = param.options.get("lr", lr) * param.options.pop("lr_mult")
    once = {id(param.tensor): param for param in reversed(params) if param.tensor.requires_grad}
    trainable = [param for param in params if once.get(id(param.tensor)) is param]
    if not trainable:
        raise ConfigError("the model has no trainable parameter", mend="freeze less, or give it one")
    return _merge(trainable, list(rules), {} if lr is None else {"lr": lr})


def _malformed(name: str, rule: Any, lr: float | None, known: set[str] | None) -> Iterator[Problem]:
    where = f"param_groups.{name}"
    if not isinstance(rule, Mapping):
        yield Problem(f"{where}={rule!r}: a rule is a mapping", f"write {where}: {{module: NAME, lr_mult: 10}}")
        return
    if name == "default":
        yield Problem(f"{where}: that name is the rest's, of what no rule decides", "choose another name")
    options = set(rule) - set(SELECTORS)
    for key in sorted(options - set(OWN_OPTIONS) - (options if known is None else known)):
        mend = did_you_mean(key, {*SELECTORS, *OWN_OPTIONS, *(known or ())}, f"{where}.")
        yield Problem(f"{where}.{key}: neither a selector nor an option of the optimizer", mend)
    if not set(rule) & set(SELECTORS):
        yield Problem(f"{where}: no selector", f"say which parameters: {', '.join(SELECTORS)}")
    if not options - {"optional"}:
        yield Problem(f"{where}: it sets nothing", f"give it an option, such as {where}.lr_mult=0.1")
    if "lr" in rule and "lr_mult" in rule:
        yield Problem(f"{where}: both lr and lr_mult", "keep one: the rate in force is lr * lr_mult")
    if "lr_mult" in rule and lr is None and "lr" not in rule:
        yield Problem(f"{where}.lr_mult: there is no lr to multiply", "set lr=VALUE")
    for key in sorted({"lr", "lr_mult", "weight_decay"} & options):
        if isinstance(rule[key], bool) or not isinstance(rule[key], int | float) or rule[key] < 0:
            yield Problem(f"{where}.{key}={rule[key]!r}: must be a number of at least 0", f"write {where}.{key}=0.1")
    for key, kind in KINDS.items():
        several = key in ("module", "type") and isinstance(rule.get(key), list)
        for value in rule[key] if several else [rule[key]] if key in rule else []:
            if not isinstance(value, kind):
                cause = f"{where}.{key}={value!r}: must be of type {kind.__name__}"
                yield Problem(cause, f"write {where}.{key}=VALUE")
    try:
        re.compile(str(rule.get("name", "")))
    except re.error as error:
        yield Problem(f"{where}.name={rule['name']!r}: no regular expression ({error})", "write a dot as '\\.'")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _is_type(owner: nn.Module, name: str) -> bool:
    """Whether a module is of a class, given by its name or by any dotted path to it."""
    if "." not in name:
        return name in {cls.__name__ for cls in type(owner).__mro__}
    try:
        return isinstance(owner, pkgutil.resolve_name(name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return False


def _matches(rule: Mapping[str, Any], param: Param) -> bool:
    return (
        ("name" not in rule or re.fullmatch(str(rule["name"]), param.name) is not None)
        and ("module" not in rule or any(param.name.startswith(f"{m}.") for m in _listed(rule["module"])))
        and ("type" not in rule or any(_is_type(param.owner, name) for name in _listed(rule["type"])))
        and ("ndim" not in rule or param.tensor.dim() == rule["ndim"])
    )


def _apply(name: str, rule: Mapping[str, Any], params: list[Param]) -> Iterator[Problem]:
    """Let a rule decide what none before it decided; tell if it could not decide anything."""
    sets = {key: value for key, value in rule.items() if key not in (*SELECTORS, "optional")}
    matched = [param for param in params if _matches(rule, param)]
    alive = [param for param in matched if not param.frozen]
    shadows: set[str] = set()
    dead = True
    for param in matched:
        shadows |= {param.decided_by[key] for key in sets if key in param.decided_by}
        free = {key: value for key, value in sets.items() if key not in param.decided_by}
        dead &= not (free and param in alive)
        param.options |= free
        param.decided_by |= dict.fromkeys(free, name)
    if not dead or rule.get("optional", False):
        return
    way_out = f"or write param_groups.{name}.optional=true"
    if not matched:
        selectors = {key: rule[key] for key in SELECTORS if key in rule}
        yield Problem(f"param_groups.{name}: no parameter matches {selectors}", _nearest(selectors, params))
    elif not alive:
        frozen = ", ".join(param.name for param in matched[:3]) + (", …" if len(matched) > 3 else "")
        yield Problem(f"param_groups.{name}: it matches only frozen parameters ({frozen})", f"delete it, {way_out}")
    else:
        deciders = ", ".join(sorted(shadows))
        yield Problem(f"param_groups.{name}: all it sets is decided before it, by {deciders}", f"move it up, {way_out}")


def _nearest(selectors: Mapping[str, Any], params: list[Param]) -> str:
    parts = [param.name.split(".") for param in params]
    among = {
        "name": {param.name for param in params},
        "module": {".".join(part[:depth]) for part in parts for depth in range(1, len(part))},
        "type": {type(param.owner).__name__ for param in params},
        "ndim": {str(param.tensor.dim()) for param in params},
    }
    key = next(iter(selectors))
    return did_you_mean(str(_listed(str(selectors[key]))[0]), among[key], f"{key}: ")


def _ties(params: list[Param]) -> Iterator[Problem]:
    first: dict[int, Param] = {}
    for param in params:
        twin = first.setdefault(id(param.tensor), param)
        if twin.options != param.options:
            yield Problem(
                f"{twin.name} and {param.name} are one (tied) parameter, decided differently: "
                f"{twin.options or 'default'} and {param.options or 'default'}",
                f"let the rules match both names: name: '{re.escape(twin.name)}|{re.escape(param.name)}'",
            )


def _merge(params: list[Param], order: list[str], defaults: dict[str, Any]) -> list[Group]:
    """One group for each set of options, in the order of the rules.

    A group is named by the rules that decided it: `a+b` where both did, `a|b` where either did, and
    `default` where some parameter in it was decided by none.
    """
    last = len(order)
    groups: dict[str, Group] = {}
    labels: dict[str, dict[str, int]] = {}  # of each group: who decided, and the place of the first of them
    for param in params:
        options = defaults | param.options
        key = repr(sorted(options.items()))
        groups.setdefault(key, Group("", [], options)).params.append(param)
        rules = [rule for rule in order if rule in param.decided_by.values()]
        labels.setdefault(key, {})["+".join(rules) or "default"] = order.index(rules[0]) if rules else last
    place: dict[str, int] = {}
    for key, group in groups.items():
        by_place = sorted(labels[key], key=lambda label: labels[key][label])
        group.name = "default" if "default" in by_place else "|".join(by_place)
        place[group.name] = last if group.name == "default" else labels[key][by_place[0]]
    return sorted(groups.values(), key=lambda group: place[group.name])

"""Param groups: the parameters of an optimizer that share all options, resolved from rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainkit.core.errors import ConfigError, Problem
from trainkit.optim.params import Param
from trainkit.optim.rules import (
    RULE_OPTIONS,
    SELECTORS,
    OptimizerOptions,
    as_list,
    check_rule,
    matches,
    suggest_selector,
)


@dataclass
class Group:
    """Parameters of one optimizer that share all options.

    Attributes:
        name: the names of the rules that set the options, or `default`.
        optimizer: the name of the optimizer.
        params: the parameters, each under its first name.
        options: the options that rules set, and lr.
        frozen_epochs: the number of epochs before the parameters are trained.
    """

    name: str
    optimizer: str
    params: list[Param]
    options: dict[str, Any]
    frozen_epochs: int = 0

    def as_param_group(self) -> dict[str, Any]:
        """Return the param group that a torch optimizer expects."""
        names = {"name": self.name, "param_names": [param.name for param in self.params]}
        return {"params": [param.tensor for param in self.params], **self.options, **names}


def resolve_groups(
    params: list[Param], rules: Mapping[str, Any], optimizers: Mapping[str, OptimizerOptions]
) -> list[Group]:
    """Resolve rules to param groups, in the order of the rules, and freeze parameters.

    The first rule that matches a parameter and sets an option decides this option of the parameter.

    Args:
        params: from `named_params`; their `rule_options` and `decided_by` are filled in.
        rules: the rules by name, as `rules` describes them.
        optimizers: the options of each optimizer, by name. A parameter without an assigned optimizer goes to
            the only optimizer that no rule names.

    Raises:
        ConfigError: all problems of the rules.
    """
    problems: list[Problem] = []
    for name, rule in rules.items():
        problems += list(check_rule(name, rule, optimizers)) or _apply_rule(name, rule, params)
    problems += [*_check_frozen_later(rules, params), *_check_tied(params)]
    if problems:
        raise ConfigError(*problems)
    trainable = _trainable(params)
    if not trainable:
        raise ConfigError("the model has no trainable parameter", hint="freeze fewer parameters")
    epochs = min(param.frozen_epochs for param in trainable)
    if epochs:
        cause = f"param_groups: the rules freeze all parameters in the first {epochs} epoch{'s' * (epochs > 1)}"
        raise ConfigError(cause, hint="freeze fewer parameters: the first epochs must train some")
    problems = [*_assign_optimizers(trainable, rules, list(optimizers)), *_check_options(trainable, optimizers)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for param in params:
        if param.frozen:
            param.tensor.requires_grad_(False)
    return _merge(trainable, rules, optimizers)


# -------------------------------------------------------------------------------------- application of rules


def _apply_rule(name: str, rule: Mapping[str, Any], params: list[Param]) -> list[Problem]:
    """Set the options of a rule that no earlier rule has set. Return a problem if the rule has no effect."""
    matched = [param for param in params if matches(rule, param)]
    all_frozen = all(param.frozen for param in matched)
    earlier: set[str] = set()
    has_effect = False
    for param in matched:
        options = {key: value for key, value in rule.items() if key not in (*SELECTORS, "optional")}
        if "layer_decay" in options:
            options["lr_mult"] = options.pop("layer_decay") ** param.height
        earlier |= {param.decided_by[key] for key in options if key in param.decided_by}
        new = {key: value for key, value in options.items() if key not in param.decided_by}
        has_effect |= bool(new) and not param.frozen
        param.rule_options |= new
        param.decided_by |= dict.fromkeys(new, name)
    if rule.get("optional", False):
        return []
    if not matched:
        selectors = {key: rule[key] for key in SELECTORS if key in rule}
        cause = f"param_groups.{name}: no parameter matches {selectors}"
        return [Problem(cause, suggest_selector(selectors, params))]
    problems = list(_check_values(name, rule, params))
    if not has_effect and all_frozen:
        cause = f"param_groups.{name}: the rule matches only frozen parameters ({_join_names(matched)})"
        problems.append(Problem(cause, f"delete the rule, {_or_optional(name)}"))
    elif not has_effect:
        cause = f"param_groups.{name}: all its options are set by earlier rules ({', '.join(sorted(earlier))})"
        problems.append(Problem(cause, f"move the rule up, {_or_optional(name)}"))
    return problems


def _check_values(name: str, rule: Mapping[str, Any], params: list[Param]) -> Iterator[Problem]:
    """Yield a problem for each value of a list that matches nothing.

    A type may match nothing, because rules are shared by models.
    """
    for key in ("module", "layer"):
        for value in as_list(rule.get(key, [])):
            if not any(matches({key: value}, param) for param in params):
                cause = f"param_groups.{name}.{key}: no parameter matches {value!r}"
                yield Problem(cause, suggest_selector({key: value}, params))


def _check_frozen_later(rules: Mapping[str, Any], params: list[Param]) -> Iterator[Problem]:
    """Yield a problem for each rule whose parameters are all frozen by later rules."""
    for position, (name, rule) in enumerate(rules.items()):
        decided = [param for param in params if name in param.decided_by.values()]
        freezing = {param.decided_by.get("freeze") for param in decided if param.frozen}
        later = [other for other in list(rules)[position + 1 :] if other in freezing]
        if later and all(param.frozen for param in decided) and not rule.get("optional"):
            cause = f"param_groups.{name}: the rule sets options of frozen parameters only ({_join_names(decided)})"
            yield Problem(f"{cause}, frozen by {', '.join(later)}", f"delete the rule, {_or_optional(name)}")


def _check_tied(params: list[Param]) -> Iterator[Problem]:
    """Yield a problem for each name of a tied parameter whose options differ from those of the first name."""
    first: dict[int, Param] = {}
    for param in params:
        other = first.setdefault(id(param.tensor), param)
        if other.rule_options != param.rule_options:
            names = [p.name for p in params if p.tensor is param.tensor]
            yield Problem(
                f"{other.name} and {param.name} are one (tied) parameter with different options: "
                f"{other.rule_options or 'default'} and {param.rule_options or 'default'}",
                f"match all its names in the same rule: name: '{'|'.join(map(re.escape, names))}'",
            )


def _join_names(params: Iterable[Param]) -> str:
    names = [param.name for param in params]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _or_optional(name: str) -> str:
    return f"or allow that it has no effect: param_groups.{name}.optional=true"


# ---------------------------------------------------------------------------------- assignment to optimizers


def _trainable(params: list[Param]) -> list[Param]:
    """Return the trainable parameters, each under its first name."""
    first = {id(param.tensor): param for param in reversed(params) if not param.frozen}
    return [param for param in params if first.get(id(param.tensor)) is param]


def _assign_optimizers(params: list[Param], rules: Mapping[str, Any], optimizers: list[str]) -> Iterator[Problem]:
    """Assign parameters without an optimizer to the only optimizer that no rule names."""
    named = {rule.get("optimizer") for rule in rules.values()}
    unnamed = [name for name in optimizers if name not in named]
    unassigned = [param for param in params if "optimizer" not in param.rule_options]
    if len(unnamed) == 1:
        for param in unassigned:
            param.rule_options["optimizer"] = unnamed[0]
    elif unassigned:
        cause = f"param_groups: no rule assigns an optimizer ({', '.join(optimizers)}) to {_join_names(unassigned)}"
        yield Problem(cause, f"add a last rule: rest: {{name: '.*', optimizer: {optimizers[-1]}}}")
        return
    for name in optimizers:
        if not any(param.rule_options["optimizer"] == name for param in params):
            hint = f"assign parameters by a rule, such as {{ndim: 2, optimizer: {name}}}, or delete optim.{name}"
            yield Problem(f"optim.{name}: no parameter is assigned to this optimizer", hint)


def _check_options(params: list[Param], optimizers: Mapping[str, OptimizerOptions]) -> Iterator[Problem]:
    """Yield a problem for each option that a parameter's optimizer does not have."""
    for param in params:
        optimizer = param.rule_options.get("optimizer")
        if optimizer is None:  # reported by _assign_optimizers
            continue
        available = optimizers[optimizer]
        for key in sorted(param.rule_options.keys() - {"freeze", "optimizer", "lr_mult"}):
            if key not in available:
                path = f"param_groups.{param.decided_by[key]}.{key}"
                cause = f"{path}: {optimizer}, the optimizer of {param.name}, does not have this option"
                yield Problem(cause, f"{optimizer} has {', '.join(sorted(available.defaults))}")
        lr = param.rule_options.get("lr", available.defaults.get("lr"))
        if "lr_mult" in param.rule_options and lr is None:
            cause = f"param_groups.{param.decided_by['lr_mult']}: {optimizer} has no lr to multiply"
            yield Problem(cause, "write lr=VALUE, or set lr in the rule")


# ------------------------------------------------------------------------------------------------- the groups


def _merge(params: list[Param], rules: Mapping[str, Any], optimizers: Mapping[str, OptimizerOptions]) -> list[Group]:
    """Return one group for each optimizer and set of effective options, in the order of the rules.

    A group is named after the rules that decided its options:

    - `a+b`: both rules decided options of each parameter.
    - `a|b`: either rule decided options of each parameter.
    - `a[3]`: rule a has a layer_decay, and the parameters are in layer 3.
    - `default`: no rule decided options of some parameter.

    A combination of rules that contains a smaller combination of the same group is not in the name.
    """
    groups: dict[str, Group] = {}
    deciders: dict[str, dict[tuple[str, ...], tuple[int, int]]] = {}  # for each group: rules -> position
    for param in params:
        optimizer, options = param.rule_options["optimizer"], effective_options(param, optimizers)
        values = sorted((name, _comparable(value)) for name, value in options.items())
        key = repr((optimizer, values, param.frozen_epochs))
        shown = {name: value for name, value in options.items() if name == "lr" or name in param.rule_options}
        groups.setdefault(key, Group("", optimizer, [], shown, param.frozen_epochs)).params.append(param)
        names, position = _deciders(param, rules)
        deciders.setdefault(key, {})[names] = position
    positioned = []
    for key, group in groups.items():
        found = deciders[key]
        minimal = [names for names in found if not any(set(other) < set(names) for other in found)]
        minimal.sort(key=found.__getitem__)
        group.name = "|".join("+".join(names) for names in minimal) or "default"
        positioned.append((found[minimal[0]], group))
    return [group for _, group in sorted(positioned, key=lambda pair: pair[0])]


def _deciders(param: Param, rules: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return the rules that decided options of a parameter, and the sort position of the first of them."""
    names = []
    position = (len(rules), 0)
    for number, (name, rule) in enumerate(rules.items()):
        if name in param.decided_by.values():
            by_layer = param.decided_by.get("lr_mult") == name and "layer_decay" in rule
            names.append(f"{name}[{param.layer}]" if by_layer else name)
            position = min(position, (number, param.layer if by_layer else 0))
    return tuple(names), position


def effective_options(param: Param, optimizers: Mapping[str, OptimizerOptions]) -> dict[str, Any]:
    """Return all options of a parameter's optimizer with the values that apply to the parameter."""
    options = {**optimizers[param.rule_options["optimizer"]].defaults, **param.rule_options}
    if "lr_mult" in options:
        options["lr"] = options["lr"] * options["lr_mult"]
    return {name: value for name, value in options.items() if name not in RULE_OPTIONS}


def _comparable(value: Any) -> Any:
    """Return a value whose repr is the same for equal values: 0 and 0.0, lists and tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

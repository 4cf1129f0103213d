"""Parameters to param groups by rule: the first that matches a parameter and sets a field decides it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainkit.core.errors import ConfigError, Problem
from trainkit.optim.params import Param
from trainkit.optim.rules import OWN_OPTIONS, SELECTORS, OptimizerOptions, listed, malformed, matches, nearest_names


@dataclass
class Group:
    """Parameters of one optimizer that share every option; `options` are those that a rule set, and lr."""

    name: str
    optimizer: str
    params: list[Param]
    options: dict[str, Any]

    def as_param_group(self) -> dict[str, Any]:
        """What `torch.optim` takes for this group."""
        names = {"name": self.name, "param_names": [param.name for param in self.params]}
        return {"params": [param.tensor for param in self.params], **self.options, **names}


def resolve_groups(
    params: list[Param], rules: Mapping[str, Any], optimizers: Mapping[str, OptimizerOptions]
) -> list[Group]:
    """Groups out of rules, in the order of the rules that decide them; freezes what they freeze.

    A rule has selectors, of which all must hold (`name`: a regular expression for the whole name;
    `module`: a path prefix; `type`: the class of the owning module, by name or dotted path,
    subclasses too; `ndim`; `layer`: as `layers` counts, -1 is the last), and options: any of the
    optimizer's, `lr_mult`, `layer_decay` (lr times it to the power of the layers above), `freeze`,
    `optimizer` (by its name), `optional`.

    Args:
        params: from `named_params`; their `fields` and `decided_by` are filled in.
        rules: name to rule.
        optimizers: the options of each optimizer by its name. What no rule gives an optimizer goes
            to the one that no rule names.

    Raises:
        ConfigError: everything that is wrong with the rules.
    """
    problems: list[Problem] = []
    for name, rule in rules.items():
        wrong = [*malformed(name, rule, optimizers)]
        problems += wrong or _apply(name, rule, params)
    problems += [*_frozen_later(rules, params), *_ties(params)]
    if problems:
        raise ConfigError(*problems)
    trainable = {id(param.tensor): param for param in reversed(params) if not param.frozen}
    chosen = [param for param in params if trainable.get(id(param.tensor)) is param]
    if not chosen:
        raise ConfigError("the model has no trainable parameter", hint="freeze less, or give it one")
    problems = [*_assign(chosen, rules, list(optimizers)), *_unknown_options(chosen, optimizers)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for param in params:
        if param.frozen:
            param.tensor.requires_grad_(False)
    return _merge(chosen, rules, optimizers)


# ------------------------------------------------------------------------------ what the rules decide


def _apply(name: str, rule: Mapping[str, Any], params: list[Param]) -> Iterator[Problem]:
    """Let a rule decide what none before it decided; tell if it could not decide anything."""
    matched = [param for param in params if matches(rule, param)]
    alive = [param for param in matched if not param.frozen]
    shadows: set[str] = set()
    dead = True
    for param in matched:
        sets = {key: value for key, value in rule.items() if key not in (*SELECTORS, "optional")}
        if "layer_decay" in sets:
            sets["lr_mult"] = sets.pop("layer_decay") ** param.height
        shadows |= {param.decided_by[key] for key in sets if key in param.decided_by}
        free = {key: value for key, value in sets.items() if key not in param.decided_by}
        dead &= not free or param.frozen
        param.fields |= free
        param.decided_by |= dict.fromkeys(free, name)
    if rule.get("optional", False):
        return
    for key in ("module", "layer"):  # a type that a model lacks is no mistake: rules are for several models
        for value in listed(rule.get(key, [])) if matched else ():
            if not any(matches({key: value}, param) for param in params):
                cause = f"param_groups.{name}.{key}: no parameter matches {value!r}"
                yield Problem(cause, nearest_names({key: value}, params))
    if not dead:
        return
    way_out = f"or write param_groups.{name}.optional=true"
    if not matched:
        selectors = {key: rule[key] for key in SELECTORS if key in rule}
        yield Problem(f"param_groups.{name}: no parameter matches {selectors}", nearest_names(selectors, params))
    elif not alive:
        cause = f"param_groups.{name}: it matches only frozen parameters ({_some(matched)})"
        yield Problem(cause, f"delete it, {way_out}")
    else:
        deciders = ", ".join(sorted(shadows))
        yield Problem(f"param_groups.{name}: all it sets is decided before it, by {deciders}", f"move it up, {way_out}")


def _frozen_later(rules: Mapping[str, Any], params: list[Param]) -> Iterator[Problem]:
    """Rules that decided something, but only of parameters that a later rule froze."""
    for place, (name, rule) in enumerate(rules.items()):
        decided = [param for param in params if name in param.decided_by.values()]
        froze = {param.decided_by.get("freeze") for param in decided if param.frozen}
        later = [other for other in list(rules)[place + 1 :] if other in froze]
        if later and all(param.frozen for param in decided) and not rule.get("optional"):
            cause = f"param_groups.{name}: it decides only frozen parameters ({_some(decided)})"
            hint = f"delete it, or write param_groups.{name}.optional=true"
            yield Problem(f"{cause}, frozen by {', '.join(later)}", hint)


def _some(params: Iterable[Param]) -> str:
    names = [param.name for param in params]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ties(params: list[Param]) -> Iterator[Problem]:
    first: dict[int, Param] = {}
    for param in params:
        twin = first.setdefault(id(param.tensor), param)
        if twin.fields != param.fields:
            names = [p.name for p in params if p.tensor is param.tensor]
            yield Problem(
                f"{twin.name} and {param.name} are one (tied) parameter, decided differently: "
                f"{twin.fields or 'default'} and {param.fields or 'default'}",
                f"let the rules match all its names: name: '{'|'.join(map(re.escape, names))}'",
            )


def _assign(params: list[Param], rules: Mapping[str, Any], optimizers: list[str]) -> Iterator[Problem]:
    """Give what no rule assigned to the one optimizer that no rule names."""
    named = {rule.get("optimizer") for rule in rules.values()}
    left = [name for name in optimizers if name not in named]
    homeless = [param for param in params if "optimizer" not in param.fields]
    if len(left) == 1:
        for param in homeless:
            param.fields["optimizer"] = left[0]
    elif homeless:
        hint = f"add a last rule: rest: {{name: '.*', optimizer: {optimizers[-1]}}}"
        yield Problem(f"param_groups: no rule gives an optimizer ({', '.join(optimizers)}) to {_some(homeless)}", hint)
        return
    for name in optimizers:
        if not any(param.fields["optimizer"] == name for param in params):
            hint = f"give it some by a rule: {{ndim: 2, optimizer: {name}}}, or delete it"
            yield Problem(f"optim.{name}: it is given no parameter", hint)


def _unknown_options(params: list[Param], optimizers: Mapping[str, OptimizerOptions]) -> Iterator[Problem]:
    """OptimizerOptions that a parameter's own optimizer does not have."""
    for param in params:
        optimizer = param.fields.get("optimizer")
        if optimizer is None:  # told already
            continue
        known = optimizers[optimizer]
        for key in param.fields.keys() - {"freeze", "optimizer", "lr_mult"}:
            if key not in known:
                where = f"param_groups.{param.decided_by[key]}.{key}"
                cause = f"{where}: {optimizer}, which {param.name} is in, has no such option"
                yield Problem(cause, f"it has {', '.join(sorted(known.defaults))}")
        if "lr_mult" in param.fields and param.fields.get("lr", known.defaults.get("lr")) is None:
            where = f"param_groups.{param.decided_by['lr_mult']}"
            yield Problem(f"{where}: {optimizer} has no lr to multiply", "set lr=VALUE, or write lr instead")


# ----------------------------------------------------------------------------------------- the groups


def _merge(params: list[Param], rules: Mapping[str, Any], optimizers: Mapping[str, OptimizerOptions]) -> list[Group]:
    """One group for each optimizer and set of options in force, in the order of the rules.

    A group is named by the rules that decided it: `a+b` where both did, `a|b` where either did,
    `a[3]` for layer 3 of a layer_decay, `default` where some parameter in it was decided by none.
    What two rules or one came to alike goes by the one.
    """
    order = list(rules)
    groups: dict[str, Group] = {}
    deciders: dict[str, dict[tuple[str, ...], tuple[int, int]]] = {}  # of each group, with the place of the first
    for param in params:
        optimizer, options = param.fields["optimizer"], in_force(param, optimizers)
        key = repr((optimizer, sorted((name, _comparable(value)) for name, value in options.items())))
        chosen = {name: value for name, value in options.items() if name == "lr" or name in param.fields}
        groups.setdefault(key, Group("", optimizer, [], chosen)).params.append(param)
        names, place = [], (len(order), 0)
        for rule in (rule for rule in order if rule in param.decided_by.values()):
            by_layer = param.decided_by.get("lr_mult") == rule and "layer_decay" in rules[rule]
            names.append(f"{rule}[{param.layer}]" if by_layer else rule)
            place = min(place, (order.index(rule), param.layer if by_layer else 0))
        deciders.setdefault(key, {})[tuple(names)] = place
    placed = []
    for key, group in groups.items():
        found = deciders[key]
        fewest = [names for names in found if not any(set(other) < set(names) for other in found)]
        fewest.sort(key=found.__getitem__)
        group.name = "|".join("+".join(names) for names in fewest) or "default"
        placed.append((found[fewest[0]], group))
    return [group for _, group in sorted(placed, key=lambda pair: pair[0])]


def in_force(param: Param, optimizers: Mapping[str, OptimizerOptions]) -> dict[str, Any]:
    """Every option of a parameter's optimizer, with the value that counts for this parameter."""
    options = {**optimizers[param.fields["optimizer"]].defaults, **param.fields}
    if "lr_mult" in options:
        options["lr"] = options["lr"] * options["lr_mult"]
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


def _comparable(value: Any) -> Any:
    """Equal values as equal text: 0 and 0.0, lists and tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def param_table(
    params: list[Param], groups: list[Group], optimizers: Mapping[str, OptimizerOptions]
) -> list[dict[str, Any]]:
    """Each parameter (a tied one once), its group, the options in force and the rule that decided each.

    Rows have `name`, `aliases` (a tied parameter's other names), `shape`, `count` (of elements),
    `layer`, `group`, `optimizer`, `options` (option to value), `decided_by` (option to a rule's name
    or `default`), `trainable`. What is frozen is in no group.
    """
    group_of = {id(param.tensor): (group, param) for group in groups for param in group.params}
    rows: dict[int, dict[str, Any]] = {}
    for param in params:
        if id(param.tensor) in rows:
            rows[id(param.tensor)]["aliases"].append(param.name)
            continue
        group, decided = group_of.get(id(param.tensor), (None, param))
        options = in_force(decided, optimizers) if group else {}
        decided_by = {name: decided.decided_by.get(name, "default") for name in options}
        if "lr_mult" in decided.decided_by and group:
            rules = [decided.decided_by[key] for key in ("lr", "lr_mult") if key in decided.decided_by]
            decided_by["lr"] = "+".join(dict.fromkeys(rules))
        if group is None:
            decided_by["freeze"] = decided.decided_by.get("freeze", "default")
        elif len(optimizers) > 1:
            decided_by["optimizer"] = decided.decided_by.get("optimizer", "default")
        rows[id(param.tensor)] = {
            "name": param.name,
            "aliases": [],
            "shape": list(param.tensor.shape),
            "count": param.tensor.numel(),
            "layer": param.layer,
            "group": group and group.name,
            "optimizer": group and group.optimizer,
            "options": options,
            "decided_by": decided_by,
            "trainable": group is not None,
        }
    return list(rows.values())

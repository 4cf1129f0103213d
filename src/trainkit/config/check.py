"""Find everything that is wrong with a composed config, without importing what it names."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config import resolvers
from trainkit.config.consistency import (
    CHOICES,
    EXAMPLES,
    UNKNOWN,
    find_contradictions,
    find_missing_packages,
    find_missing_targets,
)
from trainkit.config.data_keys import find_data_problems, find_wrong_steps
from trainkit.config.hints import can_be_off, dataclass_of, hints_of, is_off, options_of
from trainkit.config.renamed import RENAMED_VALUES, renamed_problem
from trainkit.config.schema import RootKeys
from trainkit.config.search_path import CONF
from trainkit.config.static_targets import find_missing_target
from trainkit.config.targets import nodes_with_target
from trainkit.core.errors import Problem
from trainkit.core.redaction import find_secrets
from trainkit.core.spelling import did_you_mean


def find_problems(config: DictConfig) -> list[Problem]:
    """Return everything that is wrong with a composed config, which excludes Hydra's own node."""
    problems: list[Problem] = []
    plain = _resolve(config, "", problems)
    raw = OmegaConf.to_container(config, resolve=False)
    wrong_values = _Checker(set(references(raw, ()))).check_mapping(plain, RootKeys, "")
    problems += _without_followers(list(wrong_values), raw)
    for path, node in nodes_with_target(plain):
        problem = find_missing_target(node["_target_"])
        if problem:
            problems.append(Problem(f"{path}._target_={node['_target_']}: {problem.cause}", problem.hint))
    problems += [*find_missing_targets(plain), *find_missing_packages(plain), *find_contradictions(plain, raw)]
    problems += find_data_problems(plain)
    problems += find_wrong_steps(plain)
    secrets = {*find_secrets(plain), *find_secrets(raw)}
    return list(dict.fromkeys(problem.without(secrets) for problem in problems))


def all_keys(config: DictConfig) -> list[str]:
    """Return every key of a config at any depth, dotted."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if f"{path}{key}" != "hydra":
                found.append(f"{path}{key}")
                walk(value, f"{path}{key}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    return found


def _without_followers(problems: Sequence[Problem], raw: Any) -> list[Problem]:
    """Leave out the problems of root keys that refer to another wrong key, as `val_batch_size: ${batch_size}` does."""
    wrong = {problem.cause.partition("=")[0] for problem in problems}
    followed = {key: re.fullmatch(r"\$\{(\w+)\}", str(value)) for key, value in raw.items()}
    followers = {key for key, match in followed.items() if match is not None and match[1] in wrong}
    return [problem for problem in problems if problem.cause.partition("=")[0] not in followers]


# ----------------------------------------------------------------------------------- values and ranges


@dataclass(frozen=True)
class _Checker:
    """Compares values with the schema. `references` are the keys that interpolations refer to."""

    references: set[str]

    def check_mapping(self, value: Mapping[str, Any], schema: type, path: str) -> Iterator[Problem]:
        """Yield what is wrong inside a mapping that has the keys of a dataclass."""
        hints = hints_of(schema)
        for key, item in value.items():
            if item is UNKNOWN:
                continue
            if key in hints:
                yield from self.check_value(item, hints[key], f"{path}{key}")
            elif not any(name == f"{path}{key}" or name.startswith(f"{path}{key}.") for name in self.references):
                yield _unknown_key(path, str(key), item, hints)
        for key in [f"{path}{key}" for key in hints if key not in value]:
            hint = f"choose one: {key}={CHOICES[key]}" if key in CHOICES else f"write +{key}=VALUE"
            yield Problem(f"{key}: it is missing", hint)

    def check_value(self, value: Any, hint: Any, path: str) -> Iterator[Problem]:
        """Yield what is wrong with a value that must have the type `hint`."""
        options, inner = options_of(hint), dataclass_of(hint)
        if value == "???" or (can_be_off(hint) and is_off(value)):  # `_resolve` has reported "???"
            return
        if inner is not None and isinstance(value, dict):
            yield from self.check_mapping(value, inner, f"{path}.")
        elif not any(_fits(value, option) for option in options):
            words = " or ".join(_describe(option) for option in options if option is not type(None))
            words += ", or off" * (can_be_off(hint) and path != "lr")  # most optimizers need a learning rate
            yield Problem(f"{path}={value}: must be {words}", _correction(value, hint, path))


def _unknown_key(path: str, key: str, value: Any, hints: Iterable[str]) -> Problem:
    renamed = renamed_problem(f"{path}{key}", f"{path}{key}", str(value))
    if renamed is not None:
        return renamed
    hint = did_you_mean(key, hints, path)
    if f"{path}{key}" == "experiment":
        hint = "begin the experiment's file with the line `# @package _global_`"
    return Problem(f"{path}{key}: the key does not exist, and nothing refers to it", hint)


def _correction(value: Any, hint: Any, path: str) -> str:
    """Return what to write instead of a wrong value."""
    options, inner = options_of(hint), dataclass_of(hint)
    default = OmegaConf.select(_defaults(), path)
    choices = [arg for option in options if typing.get_origin(option) is Literal for arg in typing.get_args(option)]
    if len(choices) > 1:
        return did_you_mean(str(value), choices, f"{path}=")
    if path in RENAMED_VALUES and is_off(value):
        return f"write {path}={RENAMED_VALUES[path]}, which was off before version 0.2.0"
    if inner is not None:
        return f"write {path}.{fields(inner)[0].name}={'VALUE' if isinstance(value, bool) else value}"
    if typing.get_origin(options[0]) is list and not isinstance(value, list | dict):
        return f"write {path}=[{value}]"
    if default is False or default is None:
        return EXAMPLES.get(path, f"to leave it out write {path}=off")
    return f"the default is {path}={default}" if isinstance(default, str | int | float) else "see --help"


@functools.cache
def _defaults() -> Any:
    return OmegaConf.load(CONF / "config.yaml")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0]) and value in args[1]
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(args[1]) if args[0] is str else f"{_describe(args[0])} {args[1]}"
    if origin is Literal:
        return " or ".join("true" if arg is True else str(arg) for arg in args)
    if origin is list:
        return f"a list, each {_describe(args[0])}"
    return {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}.get(hint, "a mapping")


# ------------------------------------------------------------------------------------- interpolations


def _resolve(node: Any, path: str, problems: list[Problem]) -> Any:
    """Return a config as plain containers with resolved interpolations. Append unresolvable ones to `problems`."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    plain: dict[Any, Any] = {}
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        inner = f"{path}.{key}" if path else str(key)
        try:
            value = "???" if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException as error:
            plain[key] = UNKNOWN
            problem = _unresolved(inner, str(error).splitlines()[0], node)
            problems += [problem] if problem else []
            continue
        if value == "???":
            hint = f"choose one: {inner}={CHOICES[inner]}" if inner in CHOICES else f"write {inner}=VALUE"
            problems.append(Problem(f"{inner}: it must be given", hint))
        plain[key] = _resolve(value, inner, problems)
    return plain if isinstance(node, DictConfig) else list(plain.values())


def _unresolved(path: str, text: str, node: Any) -> Problem | None:
    if "MissingMandatoryValue" in text:  # reported for the missing key itself
        return None
    variable = re.search(r"Environment variable '([^']*)' not found", text)
    key = re.search(r"Interpolation key '([^']*)' not found", text)
    kind = re.search(r"Unsupported interpolation type (\w+)", text)
    hint = "write a value instead of ${…}"
    if variable:
        hint = f"set {variable[1]}, or give a default: ${{oc.env:{variable[1]},VALUE}}"
    elif kind:
        hint = did_you_mean(kind[1], resolvers.NAMES, "${", ":}")
    elif key and key[1] in resolvers.NAMES:
        hint = f"write it with a colon: ${{{key[1]}:}}"
    elif key:
        hint = did_you_mean(key[1], all_keys(node._get_root()), "${", "}")
    return Problem(f"{path}: {text}", hint)


def references(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute keys that the interpolations of an unresolved config refer to."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from references(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from references(value, (*path, str(index)))
    elif isinstance(node, str):
        for dots, key in re.findall(r"\$\{\s*(\.*)([\w.\[\]]+)\s*\}", node):
            yield ".".join([*path[: len(path) - len(dots)], key]) if dots else key

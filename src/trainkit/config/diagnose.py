"""Find out why Hydra cannot compose a config: which override or which file is wrong."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.check import all_keys
from trainkit.config.dotted_choices import DOTTED_GROUPS, is_dotted_choice, is_dotted_path
from trainkit.config.hints import is_off, keys_of_sections
from trainkit.config.renamed import renamed_problem
from trainkit.config.search_path import CONF
from trainkit.config.static_targets import find_module_classes
from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean, nearest

# ValueError: a group's choice that is not a name, or a file that is not UTF-8. RecursionError: a config that includes
# itself.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError)

LAUNCHER_KEYS = ("n_jobs", "jobs_per_gpu")  # of trainkit's launcher


def diagnose(
    loader: ConfigLoaderImpl, overrides: Iterable[str], error: Exception
) -> tuple[DictConfig | None, list[Problem]]:
    """Apply each override alone and collect the problems.

    Returns:
        The config without the wrong overrides (None if a config file is wrong), and the problems.
    """
    problems: list[Problem] = []
    groups: list[str] = []
    values: list[Override] = []
    wrong_groups: set[str] = set()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            problems.append(_problem_of_form(text))
            continue
        wrong = _group_problems(loader, override)
        problems += wrong
        if wrong:
            wrong_groups.add(override.key_or_group)
        else:
            chooses = loader.get_group_options(override.key_or_group) and not isinstance(override.value(), dict)
            groups += [text] if chooses else []
            values += [] if chooses else [override]
    try:
        config = loader.load_configuration("config", groups, RunMode.RUN)
    except COMPOSITION_ERRORS as wrong_file:
        return None, [*problems, _file_problem(loader, wrong_file, groups)]
    for override in values:
        if override.key_or_group.partition(".")[0] in wrong_groups:  # its keys are unknown without the choice
            continue
        trial = copy.deepcopy(config)  # an override that fails may have changed a part of the config
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], trial)
            config = trial
        except (HydraException, OmegaConfBaseException):
            problems.append(key_problem(loader, config, override))
    return config, problems or [_file_problem(loader, error, groups)]


def _problem_of_form(text: str) -> Problem:
    """Return the problem of a word that Hydra cannot parse as an override."""
    if text == "last" or ("=" not in text and Path(text).is_dir()):
        hint = "write KEY=VALUE; eval, predict, export, report, compare and resume take a run"
        return Problem(f"{text}: this command takes overrides, not a run", hint)
    return Problem(
        f"{text}: not of the form KEY=VALUE", "write KEY=VALUE, and quote special characters: 'KEY=\"VALUE\"'"
    )


def key_problem(loader: ConfigLoaderImpl, config: DictConfig, override: Override) -> Problem:
    """Return why an override's key cannot be set."""
    key, text = override.key_or_group, str(override.input_line)
    plain = text.lstrip("+")
    renamed = renamed_problem(key, text, text.partition("=")[2])
    if renamed is not None:
        return renamed
    parent, _, leaf = key.rpartition(".")
    if OmegaConf.select(config, key, throw_on_missing=False) is not None and not override.is_delete():
        hint = f"write {shlex.quote(plain)}" if override.is_add() else f"to add them write {shlex.quote('+' + plain)}"
        cause = "the key exists already" if override.is_add() else f"{key} lacks some of these keys"
        return Problem(f"{text}: {cause}", hint)
    if key in LAUNCHER_KEYS:
        return Problem(f"{text}: the key {key!r} does not exist", f"write {shlex.quote('hydra.launcher.' + plain)}")
    siblings = OmegaConf.select(config, parent) if parent else config
    shipped = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    if isinstance(siblings, str) or (siblings is None and isinstance(shipped.get(parent), dict)):
        return _problem_of_value(text, parent, siblings)
    inside = [str(k) for k in siblings if k != "hydra"] if isinstance(siblings, DictConfig) else []
    close = nearest(leaf, inside)
    if close is not None:
        close = f"{parent}.{close}" if parent else close
    else:
        close = nearest(key, [*all_keys(config), *loader.list_groups("")])
    hints = [f"did you mean {close}?"] if close else []
    sections = keys_of_sections()
    can_be_added = parent not in sections or leaf in sections[parent]
    if parent and can_be_added and key.partition(".")[0] in config and not override.is_delete():
        hints.append(f"to add a new key write {shlex.quote('+' + plain)}")
    elif inside and (not close or (parent in sections and parent)):
        hints.append(f"the keys{f' of {parent}' if parent else ''} are: {', '.join(inside)}")
    return Problem(f"{text}: the key {key!r} does not exist", "; ".join(hints))


def _problem_of_value(text: str, parent: str, value: str | None) -> Problem:
    """Return why an override cannot set a key below a value: a section that is off, or a word."""
    if is_off(value):
        return Problem(f"{text}: {parent} is off, so it has no keys", f"remove {parent}=off, or {text}")
    assert value is not None
    leaf, _, given = text.removeprefix(f"{parent}.").partition("=")
    path, inside = (given, "") if leaf == "_target_" else (value, f", {leaf}: {given}")
    path = path if is_dotted_path(path) else "PATH"
    hint = f"write {parent}='{{_target_: {path}{inside}}}'"
    return Problem(f"{text}: {parent} is {value}, and only a _target_ has arguments", hint)


def _group_problems(loader: ConfigLoaderImpl, override: Override) -> list[Problem]:
    """Return what is wrong with an override that chooses from a group, or that has several values."""
    group, text = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        return [Problem(f"{text}: several values", f"add -m to train each, or write {group}=[…] for a list")]
    options, value = loader.get_group_options(group), override.value()
    if not options or isinstance(value, dict) or override.is_delete():
        return []
    if override.package is not None or (override.is_add() and value in options):
        return [Problem(f"{text}: {group} is already chosen in the defaults", f"write {group}={value}")]
    wrong = [choice for choice in (value if isinstance(value, list) else [value]) if choice not in options]
    wrong = [choice for choice in wrong if not is_dotted_choice(group, choice)]
    off = [choice for choice in wrong if not isinstance(choice, str) or choice in ("off", "null")]
    if off and "none" in options:
        return [Problem(f"{text}: {group} has no such choice", f"write {group}=none")]
    hints = {choice: did_you_mean(str(choice), options, f"{group}=") for choice in wrong}
    if group in DOTTED_GROUPS:
        hints |= {choice: hint for choice in wrong if (hint := _hint_of_module(group, str(choice)))}
    if group == "data":
        hints |= {choice: f"write data.train._target_={choice}" for choice in wrong if is_dotted_path(choice)}
    return [Problem(f"{text}: {group} has no choice {choice!r}", hint) for choice, hint in hints.items()]


def _hint_of_module(group: str, choice: str) -> str:
    """Return how to write a choice that names a module of the user: `mynets` or `mynets:Net`."""
    module, _, name = choice.partition(":")
    if name:
        path = f"{module}.{name}"
        return f"write {group}={path}" if is_dotted_path(path) else ""
    file = Path(f"{module}.py")
    if not module.isidentifier() or not file.is_file():
        return ""
    names = find_module_classes(file) if group in ("model", "loss") else []
    if len(names) == 1:
        return f"write {group}={module}.{names[0]}"
    return f"write {group}={module}.CLASS" + (f"; the classes of {file} are {', '.join(names)}" if names else "")


def _file_problem(loader: ConfigLoaderImpl, error: Exception, groups: list[str]) -> Problem:
    """Return what is wrong inside a config file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return Problem(f"{mark.name}, line {mark.line + 1}: {error.problem}", "correct the YAML there")
    cause = error if str(error) else error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = "the defaults of a config include the config itself" if isinstance(error, RecursionError) else ""
    text = text or " ".join(lines[:2])
    chosen = f" (with {' '.join(groups)})" if groups else ""
    wanted = re.search(r"Could not find '([^']+)'", text)
    override = re.search(r"Could not override '([^']+)'", text)
    hint = "let the first line of an experiment be `# @package _global_`, and choose by `- override /GROUP: NAME`"
    if wanted:
        group, _, name = wanted[1].rpartition("/")
        text = text.partition(" Config search path")[0]
        hint = did_you_mean(name, loader.get_group_options(group), f"{group}: " if group else "")
        if group == "data" and is_dotted_path(name):
            hint = f"write data: {{train: {{_target_: {name}}}}} in the experiment"
    elif override and "@" not in override[1]:  # with a package, the file is not global
        hint = did_you_mean(override[1], loader.list_groups(""), "override /") or hint
    return Problem(text + chosen, hint)

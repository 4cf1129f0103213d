"""Composition by Hydra: the search path, a run's config, a sweep's, and why one cannot be composed.

Nothing here imports torch: a typo is answered before anything slow.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config import resolvers  # noqa: F401  # registers what configs may ask for
from trainkit.config.schema import check, paths, turn_off
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.spelling import did_you_mean, nearest

PACKAGE = Path(__file__).parents[1]
# A wheel holds the shipped configs inside the package, a checkout at its top.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
# ValueError: a group's choice that is no name, or a file that is no UTF-8; RecursionError: a config in itself.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError)
MAX_CHECKED_JOBS = 200  # of a sweep, before any is trained
MAX_VALUES = 100_000  # of a key in a sweep


@dataclass(frozen=True)
class Composed:
    """A checked config, and what Hydra says of how it came about."""

    config: DictConfig
    hydra: DictConfig
    overrides: list[str]
    directory: Path | None = None  # for the run, where the command names one

    @property
    def own_files(self) -> bool:
        """Whether a config that trainkit does not ship was chosen."""
        choices = self.hydra.runtime.choices.items()
        return any(not (CONF / str(g) / f"{name}.yaml").is_file() for g, name in choices if "/" not in str(g))


@dataclass(frozen=True)
class Sweep:
    """The checked jobs of a sweep, as far as they can be known, and its directory."""

    jobs: list[Composed]
    more_jobs: bool  # than were checked
    directory: Path
    directory_given: bool


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The config that `trainkit OVERRIDES` trains.

    Args:
        overrides: as on the command line, such as `["optim=adam", "lr=0.01"]`.
        config_dir: a folder of configs besides ./conf.

    Raises:
        ConfigError: all that is wrong with it.
    """
    if isinstance(overrides, str):
        raise TypeError("overrides is a list, such as ['optim=adam', 'lr=0.01']")
    return compose_run(overrides, config_dir).config


def compose_run(overrides: Sequence[str] = (), config_dir: str | None = None) -> Composed:
    """As `compose`, with what Hydra says of it; the error holds what could be composed all the same."""
    loader = make_loader(config_dir)
    problems: list[Problem] = []
    whole: DictConfig | None
    try:
        whole = loader.load_configuration("config", list(overrides), RunMode.RUN)
    except COMPOSITION_ERRORS as error:
        whole, problems = _diagnose(loader, overrides, error)
    if whole is None:
        raise ConfigError(*problems)
    HydraConfig.instance().set_config(whole)  # for `${hydra:...}`
    directory = None
    try:
        directory = _given_directory(whole, overrides, "run")
    except ConfigError as error:
        problems += error.problems
    OmegaConf.set_struct(whole, False)
    hydra = whole.pop("hydra")
    composed = Composed(whole, hydra, list(overrides), directory)
    try:
        checked(whole)
    except ConfigError as error:
        problems += error.problems
    if problems:
        wrong = ConfigError(*dict.fromkeys(problems))
        wrong.composed = composed
        raise wrong
    return composed


def checked(config: DictConfig) -> DictConfig:
    """A composed config, checked, with every way to write off turned into None.

    Raises:
        ConfigError: all that is wrong with it.
    """
    problems = check(config, OmegaConf.load(CONF / "config.yaml"))  # type: ignore[arg-type]  # it is no list
    if problems:
        raise ConfigError(*problems)
    OmegaConf.set_struct(config, False)
    turn_off(config)
    OmegaConf.set_struct(config, True)
    return config


def compose_sweep(overrides: Sequence[str], config_dir: str | None = None) -> Sweep:
    """A sweep, whose every job is composed and checked first.

    Raises:
        ConfigError: all that is wrong with any of the jobs.
    """
    loader = make_loader(config_dir)
    problems: list[Problem] = []
    try:
        whole = loader.load_configuration("config", list(overrides), RunMode.MULTIRUN)
        basic = "BasicSweeper" in str(whole.hydra.sweeper._target_)  # others choose their jobs as they go
    except COMPOSITION_ERRORS:
        whole, basic = None, True
    values = []
    for text in overrides if basic else ():
        try:
            values.append(_values(loader, text))
        except ConfigError as error:
            problems += error.problems
    combinations = itertools.product(*values) if basic else iter(())
    jobs: list[Composed] = []
    for job in itertools.islice(combinations, MAX_CHECKED_JOBS):
        try:
            jobs.append(compose_run(job, config_dir))
        except ConfigError as error:
            problems += error.problems
    if whole is None and not problems:
        problems.append(Problem("the sweep cannot be composed", "try one of its runs without -m"))
    if problems or whole is None:
        raise ConfigError(*dict.fromkeys(problems))
    given = _given_directory(whole, overrides, "sweep")
    return Sweep(jobs, next(combinations, None) is not None, given or Path(whole.hydra.sweep.dir), given is not None)


def _values(loader: ConfigLoaderImpl, text: str) -> list[str]:
    """An override once for each value that it sweeps over; as it is where Hydra cannot read it."""
    try:
        override = OverridesParser.create(config_loader=loader).parse_overrides([text])[0]
        if not override.is_sweep_override():
            return [text]
        found = list(itertools.islice(override.sweep_string_iterator(), MAX_VALUES + 1))
    except HydraException as error:
        if "=" in text and "interval" in text:
            raise ConfigError(f"{text}: {error}", hint="list the values: KEY=1,2,3, or use range") from error
        return [text]
    if len(found) > MAX_VALUES:
        raise ConfigError(f"{text}: more than {MAX_VALUES:,} values", hint="sweep over fewer")
    return [f"{override.get_key_element()}={value}" for value in found]


def _given_directory(whole: DictConfig, overrides: Iterable[str], mode: str) -> Path | None:
    """The directory that `hydra.run.dir` (or sweep) names, where the command line sets it."""
    key = f"hydra.{mode}.dir"
    if not any(text.lstrip("+").startswith(f"{key}=") for text in overrides):
        return None
    try:
        directory = OmegaConf.select(whole, key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}", hint=f"write {key}=DIR") from error
    if not directory:
        raise ConfigError(f"{key}: it names no directory", hint=f"write {key}=DIR")
    return Path(directory)


# --------------------------------------------------------------------------------- where configs lie


def search_path(config_dir: str | None = None) -> ConfigSearchPath:
    """Where configs are looked for: the shipped ones first, then `config_dir`, then ./conf."""
    path = create_config_search_path(str(CONF))
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder", hint="name a folder of configs")
    for folder in user_folders(config_dir):
        path.prepend("trainkit", f"file://{folder}", "schema")
    return path


def user_folders(config_dir: str | None = None) -> list[Path]:
    """The folders of the user's own configs, in the order they are searched."""
    folders = [Path(folder).resolve() for folder in (config_dir, "conf") if folder is not None]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir() and folder != CONF.resolve()]


def unread(config_dir: str | None = None) -> list[tuple[Path, str]]:
    """The user's configs that nothing reads, each with why."""
    found = []
    for folder in user_folders(config_dir):
        for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            if file.suffix == ".yml":
                found.append((file, "configs end in .yaml, rename it"))
            elif (CONF / file.relative_to(folder)).is_file():
                found.append((file, "trainkit ships one of that name, rename it"))
    return found


def make_loader(config_dir: str | None = None) -> ConfigLoaderImpl:
    """Hydra's config loader over the search path."""
    hydra_version.setbase("1.3")
    setup_globals()
    return ConfigLoaderImpl(search_path(config_dir))


def _diagnose(
    loader: ConfigLoaderImpl, overrides: Iterable[str], error: Exception
) -> tuple[DictConfig | None, list[Problem]]:
    """Why Hydra could not compose: each override judged alone; and the config without the wrong ones."""
    problems: list[Problem] = []
    groups: list[str] = []
    values: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            hint = "write KEY=VALUE, and quote special characters: 'KEY=\"VALUE\"'"
            problems.append(Problem(f"{text}: not of the form KEY=VALUE", hint))
            continue
        wrong = _group_problems(loader, override)
        problems += wrong
        if not wrong:
            chooses = loader.get_group_options(override.key_or_group) and not isinstance(override.value(), dict)
            groups += [text] if chooses else []
            values += [] if chooses else [override]
    try:
        config = loader.load_configuration("config", groups, RunMode.RUN)
    except COMPOSITION_ERRORS as wrong_file:
        return None, [*problems, _file_problem(loader, wrong_file, groups)]
    for override in values:
        trial = copy.deepcopy(config)  # one that fails half-way leaves traces
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], trial)
            config = trial
        except (HydraException, OmegaConfBaseException):
            problems.append(key_problem(loader, config, override))
    return config, problems or [_file_problem(loader, error, groups)]


def _group_problems(loader: ConfigLoaderImpl, override: Override) -> list[Problem]:
    """What is wrong with an override as a choice of a group's, or as several values."""
    group, text = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        return [Problem(f"{text}: several values", f"add -m to train each, or write {group}=[…] for a list")]
    options, value = loader.get_group_options(group), override.value()
    if not options or isinstance(value, dict) or override.is_delete():
        return []
    if override.package is not None or (override.is_add() and value in options):
        return [Problem(f"{text}: {group} is chosen once, in its place", f"write {group}={value}")]
    wrong = [choice for choice in (value if isinstance(value, list) else [value]) if choice not in options]
    no_choice = [choice for choice in wrong if not isinstance(choice, str) or choice in ("off", "null")]
    if no_choice and "none" in options:
        return [Problem(f"{text}: {group} has no such choice", f"write {group}=none")]
    hints = {choice: did_you_mean(str(choice), options, f"{group}=") for choice in wrong}
    return [Problem(f"{text}: {group} has no choice {choice!r}", hint) for choice, hint in hints.items()]


def key_problem(loader: ConfigLoaderImpl, config: DictConfig, override: Override) -> Problem:
    """Why a value could not be set."""
    key, text = override.key_or_group, str(override.input_line)
    parent, _, leaf = key.rpartition(".")
    if OmegaConf.select(config, key, throw_on_missing=False) is not None and not override.is_delete():
        hint = f"write {text.lstrip('+')}" if override.is_add() else f"to add them write +{text}"
        cause = "it is there already" if override.is_add() else f"{key} lacks some of these keys"
        return Problem(f"{text}: {cause}", hint)
    siblings = OmegaConf.select(config, parent) if parent else config
    inside = [str(k) for k in siblings if k != "hydra"] if isinstance(siblings, DictConfig) else []
    close = nearest(leaf, inside)
    if close is not None:
        close = f"{parent}.{close}" if parent else close
    else:
        close = nearest(key, [*paths(config), *loader.list_groups("")])
    hints = [f"did you mean {close}?"] if close else []
    if parent and key.partition(".")[0] in config and not override.is_delete():
        hints.append(f"to add a new key write +{text.lstrip('+')}")
    elif not close:
        hints.append(f"there is: {', '.join(inside)}")
    return Problem(f"{text}: there is no key {key!r}", "; ".join(hints))


def _file_problem(loader: ConfigLoaderImpl, error: Exception, groups: list[str]) -> Problem:
    """What is wrong inside a config file, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return Problem(f"{mark.name}, line {mark.line + 1}: {error.problem}", "mend the YAML there")
    cause = error if str(error) else error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = "a config's defaults name itself" if isinstance(error, RecursionError) else " ".join(lines[:2])
    chosen = f" (with {' '.join(groups)})" if groups else ""
    wanted = re.search(r"Could not find '([^']+)'", text)
    override = re.search(r"Could not override '([^']+)'", text)
    hint = "an experiment begins with `# @package _global_` and chooses by `- override /GROUP: NAME` in its defaults"
    if wanted:
        group, _, name = wanted[1].rpartition("/")
        text = text.partition(" Config search path")[0]
        hint = did_you_mean(name, loader.get_group_options(group), f"{group}: " if group else "")
    elif override:
        hint = did_you_mean(override[1], loader.list_groups(""), "override /") or hint
    return Problem(text + chosen, hint)

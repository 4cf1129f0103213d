"""Compose the config of a run or of a sweep with Hydra, and check it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.debug import find_debug_contradictions
from trainkit.config.diagnose import COMPOSITION_ERRORS, diagnose
from trainkit.config.hints import is_off
from trainkit.config.length import find_two_lengths
from trainkit.config.replaced_targets import drop_replaced_arguments, mark_new_arguments
from trainkit.config.search_path import CONF, make_loader, make_sweep_loader
from trainkit.config.search_problems import find_float_ends, find_search_problems
from trainkit.config.search_space import Space, describe_parse_error, find_active, has_interval, read_space
from trainkit.config.settings import Settings, read_settings
from trainkit.config.split_words import find_merged_choices, find_split_words
from trainkit.config.targets import find_wrong_targets
from trainkit.core.errors import ConfigError, Problem

MAX_CHECKED_JOBS = 200  # jobs of a sweep that are checked before the first one starts
MAX_VALUES = 100_000  # values of one key in a sweep
PARAMS = "hydra.sweeper.params"


@dataclass(frozen=True)
class Composed:
    """The settings of a run, and what Hydra composed them from."""

    settings: Settings
    overrides: Sequence[str] = ()
    hydra: DictConfig | None = None
    directory: Path | None = None  # of the run, if the command line sets it
    notes: tuple[str, ...] = ()  # about the config, for the user


@dataclass(frozen=True)
class Unchecked:
    """A composed config that has errors."""

    config: DictConfig
    overrides: Sequence[str]
    hydra: DictConfig

    def find_wrong_arguments(self) -> list[Problem]:
        """Return the wrong arguments of each `_target_`. This imports the target's module.

        The arguments of shipped configs are right, so these are not checked.
        """
        if not (self._has_user_files() or self._adds_arguments()):
            return []
        try:
            return find_wrong_targets(OmegaConf.to_container(self.config, resolve=True))
        except OmegaConfBaseException:  # an interpolation that is reported already
            return []

    def _has_user_files(self) -> bool:
        for group, choice in self.hydra.runtime.choices.items():
            names = choice if OmegaConf.is_list(choice) else [choice]
            if "/" not in str(group) and not all((CONF / str(group) / f"{name}.yaml").is_file() for name in names):
                return True
        return False

    def _adds_arguments(self) -> bool:
        nodes = [text.lstrip("+").partition("=")[0].rpartition(".")[0] for text in self.overrides if text[:1] == "+"]
        added = [OmegaConf.select(self.config, node, throw_on_missing=False) for node in nodes if node]
        return any(isinstance(node, DictConfig) and "_target_" in node for node in added)


@dataclass(frozen=True)
class Sweep:
    """The checked jobs of a sweep, and the sweep's directory."""

    jobs: list[Composed]
    more_jobs: bool  # whether there are jobs that were not checked
    directory: Path
    directory_given: bool
    loader: ConfigLoaderImpl  # holds what the jobs have in common
    space: Space | None = None  # of a search, which chooses its jobs itself; `jobs` are then examples


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """Return the config that `trainkit OVERRIDES` trains.

    Args:
        overrides: as on the command line, such as `["optim=adam", "lr=0.01"]`.
        config_dir: a folder of configs besides ./conf.

    Raises:
        ConfigError: everything that is wrong with the config.
    """
    if isinstance(overrides, str):
        raise TypeError("overrides is a list, such as ['optim=adam', 'lr=0.01']")
    return compose_run(overrides, config_dir).settings.source


def compose_run(overrides: Sequence[str] = (), config_dir: str | None = None) -> Composed:
    """Return the settings that `trainkit OVERRIDES` trains, with what Hydra composed them from.

    Raises:
        ConfigError: everything that is wrong with the config; `error.composed` is `Unchecked` or None.
    """
    _check_overrides(overrides)
    return compose_with(make_loader(config_dir), overrides)


def compose_with(loader: ConfigLoaderImpl, overrides: Sequence[str]) -> Composed:
    """Return the settings of a run that a loader composes; see `compose_run`."""
    whole, problems = _load(loader, overrides)
    merged = [] if whole is None else find_merged_choices(overrides, whole)
    if whole is None or merged:  # choices that are merged give false errors about their arguments
        raise ConfigError(*problems, *merged)
    HydraConfig.instance().set_config(whole)  # for `${hydra:...}`
    directory = None
    try:
        directory = _given_directory(whole, overrides, "run")
    except ConfigError as error:
        problems += error.problems
    OmegaConf.set_struct(whole, False)
    hydra = whole.pop("hydra")
    written = mark_new_arguments(overrides)
    notes = drop_replaced_arguments(whole, written, hydra.runtime.choices, lambda texts: _load(loader, texts)[0])
    problems += find_two_lengths(overrides, whole)
    problems += find_debug_contradictions(hydra.runtime.choices, overrides)
    try:
        settings = read_settings(whole)
        if not problems:
            return Composed(settings, list(overrides), hydra, directory, notes)
    except ConfigError as error:
        problems += error.problems
    failed = ConfigError(*dict.fromkeys(problems))
    failed.composed = Unchecked(whole, written, hydra)
    raise failed


def _load(loader: ConfigLoaderImpl, overrides: Sequence[str]) -> tuple[DictConfig | None, list[Problem]]:
    """Return the config without the wrong overrides (None if a config file is wrong), and the problems."""
    written = mark_new_arguments(overrides)
    try:
        return loader.load_configuration("config", written, RunMode.RUN), []
    except COMPOSITION_ERRORS as error:
        config, problems = diagnose(loader, written, error)
    added = tuple(f"{text}: " for text in set(written) - set(overrides))
    return config, [
        replace(problem, cause=problem.cause.removeprefix("++")) if problem.cause.startswith(added) else problem
        for problem in problems
    ]


def compose_sweep(
    overrides: Sequence[str], config_dir: str | None = None, on_first_job: Callable[[Composed], object] | None = None
) -> Sweep:
    """Return a sweep. Its first `MAX_CHECKED_JOBS` jobs are composed and checked.

    Args:
        overrides: the overrides of the command line.
        config_dir: a folder of configs besides ./conf.
        on_first_job: is called with the first job as soon as it is valid, before the other jobs are checked.

    Raises:
        ConfigError: everything that is wrong with any of these jobs.
    """
    loader = make_sweep_loader(config_dir)
    _check_overrides(overrides, loader)
    problems: list[Problem] = []
    params: dict[str, Any] = {}
    try:
        whole = loader.load_configuration("config", mark_new_arguments(overrides), RunMode.MULTIRUN)
        sweeper = str(whole.hydra.sweeper._target_)
        basic = "BasicSweeper" in sweeper  # other sweepers choose jobs during the sweep
        searches = "TrainkitSweeper" in sweeper or (basic and _has_search_key(whole, overrides))
        params = dict(whole.hydra.sweeper.get("params") or {})
    except COMPOSITION_ERRORS:
        whole, basic, searches = None, True, False
    if searches or (basic and has_interval(overrides, params)):
        return _compose_search(loader, whole, overrides, params, on_first_job)
    values = []
    for text in with_params(overrides, params) if basic else ():
        try:
            values.append(_values(loader, text))
        except ConfigError as error:
            problems += error.problems
    combinations = itertools.product(*values) if basic else iter(())
    jobs: list[Composed] = []
    for job in itertools.islice(combinations, MAX_CHECKED_JOBS):
        try:
            jobs.append(compose_with(loader, job))
        except ConfigError as error:
            problems += error.problems
        if len(jobs) == 1 and not problems and on_first_job is not None:
            on_first_job(jobs[0])
    if whole is None and not problems:
        problems.append(Problem("the sweep cannot be composed", "try one of its runs without -m"))
    if problems or whole is None:
        raise ConfigError(*dict.fromkeys(problems))
    given = _given_directory(whole, overrides, "sweep")
    more_jobs = next(combinations, None) is not None
    return Sweep(jobs, more_jobs, given or Path(whole.hydra.sweep.dir), given is not None, loader)


def _has_search_key(whole: DictConfig, overrides: Sequence[str]) -> bool:
    """Return whether a config gives a search its end, or the command line sets a key of a search."""
    given = [text.lstrip("+").partition("=")[0].removeprefix("search.") for text in overrides if "search." in text]
    search = whole.get("search")  # anything else than a mapping is reported with the jobs
    return isinstance(search, DictConfig) and any(
        not is_off(search.get(key)) for key in ("trials", "minutes", "epochs", *given) if key in search
    )


def _check_overrides(overrides: Sequence[str], loader: ConfigLoaderImpl | None = None) -> None:
    """Raise `ConfigError` for split words, `hydra.sweeper.params`, and several values of a key that cannot vary.

    Args:
        overrides: of the command line.
        loader: of a sweep; None: only the first check is made.
    """
    problems = find_split_words(overrides)
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key == PARAMS or key.startswith(f"{PARAMS}."):
            plain = f"{key.removeprefix(PARAMS + '.')}={value}" if key != PARAMS and value else "KEY=VALUE for each key"
            cause = f"{text}: hydra.sweeper.params is for config files; the command line gives the values themselves"
            problems.append(Problem(cause, f"write {plain}"))
        elif key.startswith(("hydra.", "hydra/", "search.")) and loader is not None and _varies(loader, text):
            cause = f"{text}: several values, and {key} is the same for all jobs"
            problems.append(Problem(cause, f"write one value, or quote it: '{key}=\"{value}\"'"))
    if problems:
        raise ConfigError(*problems)


def _varies(loader: ConfigLoaderImpl, text: str) -> bool:
    """Return whether an override has several values."""
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides([text])[0].is_sweep_override()
    except (HydraException, OmegaConfBaseException):  # reported with the jobs
        return False


def with_params(overrides: Sequence[str], params: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a command line after those of `hydra.sweeper.params` that it does not replace."""
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    return [*(f"{key}={value}" for key, value in params.items() if key.lstrip("+") not in given), *overrides]


def _compose_search(
    loader: ConfigLoaderImpl,
    whole: DictConfig | None,
    overrides: Sequence[str],
    params: Mapping[str, Any],
    on_first_job: Callable[[Composed], object] | None,
) -> Sweep:
    """Return a search. A few jobs that use every choice and the ends of every interval are composed and checked.

    Raises:
        ConfigError: everything that is wrong with any of these jobs.
    """
    space = read_space(loader, overrides, params)
    own = [text for text in overrides if text.lstrip("+").startswith("search.")]
    problems = find_active(space, lambda texts: _load(loader, [*own, *texts]))
    jobs: list[Composed] = []
    for job in itertools.islice(space.samples(), MAX_CHECKED_JOBS) if not problems else ():
        try:
            jobs.append(compose_with(loader, [*own, *job]))
        except ConfigError as error:
            problems += error.problems
        if len(jobs) == 1 and not problems and on_first_job is not None:
            on_first_job(jobs[0])
    problems = [find_float_ends(space, problem) for problem in problems]
    if jobs:
        problems += find_search_problems(space, [job.settings for job in jobs])
    if whole is None and not problems:
        problems += _load(loader, [text for text in overrides if text.lstrip("+~").startswith("hydra")])[1]
    if problems or whole is None:
        raise ConfigError(*dict.fromkeys(problems or [Problem("the search cannot be composed")]))
    given = _given_directory(whole, overrides, "sweep")
    return Sweep(jobs, False, given or Path(whole.hydra.sweep.dir), given is not None, loader, space)


def drop_replaced(
    config: DictConfig, overrides: Sequence[str], hydra: DictConfig, loader: ConfigLoaderImpl
) -> tuple[str, ...]:
    """Drop the arguments of replaced `_target_`s from a job's config, in place; return notes for the user.

    Args:
        config: without Hydra's node.
        overrides: the overrides of the job.
        hydra: Hydra's node.
        loader: loads the config before the new targets.
    """
    written = mark_new_arguments(overrides)
    return drop_replaced_arguments(config, written, hydra.runtime.choices, lambda texts: _load(loader, texts)[0])


def _values(loader: ConfigLoaderImpl, text: str) -> list[str]:
    """Return an override once for each of its values; unchanged if Hydra cannot parse the override."""
    try:
        override = OverridesParser.create(config_loader=loader).parse_overrides([text])[0]
        if not override.is_sweep_override():
            return [text]
        found = list(itertools.islice(override.sweep_string_iterator(), MAX_VALUES + 1))
    except (HydraException, OmegaConfBaseException) as error:
        problem = describe_parse_error(text, error)
        if problem is not None:
            raise ConfigError(problem) from error
        return [text]
    if len(found) > MAX_VALUES:
        raise ConfigError(f"{text}: more than {MAX_VALUES:,} values", hint="sweep over fewer values")
    return [f"{override.get_key_element()}={value}" for value in found]


def _given_directory(whole: DictConfig, overrides: Iterable[str], mode: str) -> Path | None:
    """Return the directory in `hydra.run.dir` (or `hydra.sweep.dir`), if the command line sets it."""
    key = f"hydra.{mode}.dir"
    if not any(text.lstrip("+").startswith(f"{key}=") for text in overrides):
        return None
    try:
        directory = OmegaConf.select(whole, key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}", hint=f"write {key}=DIR") from error
    if not directory:
        raise ConfigError(f"{key}: the value is empty", hint=f"write {key}=DIR")
    return Path(directory)

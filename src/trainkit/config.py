"""The config: composed by Hydra, checked against a schema, every problem told at once.

Nothing here imports torch: a typo is answered before anything slow.
"""

from __future__ import annotations

import argparse
import itertools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.errors import ConfigError, Problem, did_you_mean, nearest
from trainkit.targets import missing_source, targets

HERE = Path(__file__).parent
CONF = (
    HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf"
)  # a wheel's, else the checkout's


COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
MOST_CHECKED_JOBS = 200  # of a sweep, before any is trained


# ------------------------------------------------------------------------------------------ the schema


@dataclass(frozen=True)
class Range:
    """The numbers that make sense: from `least` up, or those greater than `above`, below `below`."""

    least: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"of at least": self.least, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


@dataclass(frozen=True)
class Pattern:
    """The strings that make sense, and how a message says so."""

    regex: str
    words: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.regex, value) is not None

    def __str__(self) -> str:
        return self.words


Count = Annotated[int, Range(least=1)]
Open = dict[str, Any]  # keys that are not trainkit's to know: a `_target_`'s arguments, names of one's own


@dataclass
class Monitor:
    """Which metric decides the best epoch."""

    metric: Literal["train/loss", "val/loss", "val/accuracy"]
    mode: Literal["min", "max"]


@dataclass
class EarlyStop:
    """When to stop before the last epoch."""

    patience: Count | None
    min_delta: Annotated[float, Range(least=0)]


@dataclass
class Normalize:
    """(x - mean) / std, on inputs from 0 to 1; a number for all channels or one for each."""

    mean: float | list[float]
    std: float | list[float]


@dataclass
class Data:
    """The data sets; a data/*.yaml may add keys that its own values refer to."""

    train: Open
    val: Open | None
    split: Annotated[float, Range(above=0, below=1)] | None
    classes: Count | None
    normalize: Normalize | None
    num_workers: Annotated[int, Range(least=0)]


@dataclass
class Schema:
    """The root of a config."""

    model: Open
    data: Data
    loss: Open
    optim: Open
    scheduler: Open | None
    param_groups: dict[str, Open]
    lr: Annotated[float, Range(least=0)] | None
    epochs: Count
    batch_size: Count
    micro_batch: Count | None
    seed: Annotated[int, Range(least=0)]
    device: Annotated[str, Pattern(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:N or mps")]
    deterministic: bool | None
    clip_norm: Annotated[float, Range(above=0)] | None
    clip_value: Annotated[float, Range(above=0)] | None
    limit_batches: Count | None
    watch: list[str]
    hooks: dict[str, Open]
    progress: Literal["auto", "rich", "tqdm", "plain", "off"]
    monitor: Monitor
    early_stop: EarlyStop | None


def check(config: DictConfig) -> list[Problem]:
    """All that is wrong with a composed config, as far as no import can tell."""
    problems: list[Problem] = []
    references = set(_references(OmegaConf.to_container(config, resolve=False), ()))
    plain = _resolve(config, "", problems)
    problems += _check_mapping(plain, Schema, "", references)
    for path, node in targets(plain):
        problem = missing_source(node["_target_"])
        if problem:
            problems.append(Problem(f"{path}._target_={node['_target_']}: {problem.cause}", problem.mend))
    problems += _check_together(plain)
    return list(dict.fromkeys(problems))


def _check_together(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """What no key shows alone."""
    for key in ("loss", "optim"):
        if isinstance(plain.get(key), dict) and "_target_" not in plain[key]:
            yield Problem(
                f"{key}: no _target_", f"choose one: {key}={'cross_entropy' if key == 'loss' else 'sgd'}"
            )
    data, loss = plain.get("data"), plain.get("loss")
    one_class = isinstance(data, dict) and data.get("classes") == 1
    if one_class and isinstance(loss, dict) and str(loss.get("_target_")).endswith("CrossEntropyLoss"):
        yield Problem("loss: cross entropy over one class is always 0", "choose one for numbers: loss=mse")
    optim, lr = plain.get("optim"), plain.get("lr")
    if isinstance(optim, dict) and lr is not None and "_target_" in optim and "lr" not in optim:
        yield Problem(f"lr={lr}: the optim config does not use it", "write `lr: ${lr}` into the optim config")
    scheduler = plain.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("interval", "epoch") not in ("epoch", "step"):
        mend = did_you_mean(str(scheduler["interval"]), ["epoch", "step"], "scheduler.interval=")
        yield Problem(f"scheduler.interval={scheduler['interval']}: must be epoch or step", mend)
    monitor = plain.get("monitor")
    if isinstance(monitor, dict) and monitor.get("mode") in ("min", "max"):
        mode = "max" if monitor.get("metric") == "val/accuracy" else "min"
        if monitor["mode"] != mode:
            yield Problem(
                f"monitor: the best {monitor.get('metric')} is its {mode}", f"write monitor.mode={mode}"
            )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == "off"


def _options(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # Annotated | None gives the latter
    return list(typing.get_args(hint)) if union else [hint]


def _check_mapping(
    value: Mapping[str, Any], schema: type, path: str, references: set[str]
) -> Iterator[Problem]:
    hints = typing.get_type_hints(schema, include_extras=True)
    for key, item in value.items():
        where = f"{path}{key}"
        if key not in hints:
            if not any(name == where or name.startswith(f"{where}.") for name in references):
                mend = did_you_mean(str(key), hints, path)
                yield Problem(f"{where}: there is no such key, and nothing refers to it", mend)
        elif item == "???":
            yield Problem(f"{where}: it must be given", f"write {where}=VALUE")
        else:
            yield from _check_value(item, hints[key], where, references)
    for key in hints.keys() - value.keys():
        yield Problem(f"{path}{key}: it is missing", f"choose one: {path}{key}=NAME")


def _check_value(value: Any, hint: Any, path: str, references: set[str]) -> Iterator[Problem]:
    options = _options(hint)
    if type(None) in options and _is_off(value):
        return
    schema = next((option for option in options if is_dataclass(option)), None)
    if schema is not None and isinstance(value, dict):
        yield from _check_mapping(value, typing.cast(type, schema), f"{path}.", references)
    elif not any(_fits(value, option) for option in options):
        choices = [
            arg
            for option in options
            if typing.get_origin(option) is Literal
            for arg in typing.get_args(option)
        ]
        default = OmegaConf.select(OmegaConf.load(CONF / "config.yaml"), path)
        mend = (
            "" if isinstance(default, DictConfig) or default is None else f"the default is {path}={default}"
        )
        if default is False:
            mend = f"the default is {path}=off"
        if typing.get_origin(options[0]) is list and not isinstance(value, list):
            mend = f"write {path}=[{value}]"
        if choices:
            mend = did_you_mean(str(value), choices, f"{path}=")
        words = " or ".join(_words(option) for option in options if option is not type(None))
        words += ", or off" * (type(None) in options)
        yield Problem(f"{path}={value}: must be {words}", mend or f"write {path}=VALUE")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0]) and value in args[1]
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(args[1]) if args[0] is str else f"{_words(args[0])} {args[1]}"
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is list:
        return f"a list, each {_words(args[0])}"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a word",
        bool: "true or false",
        type(None): "off",
    }
    return names.get(hint, "a mapping")


def _turn_off(config: DictConfig, schema: type) -> None:
    """Make every way to write off (off, false, null) None."""
    for key, hint in typing.get_type_hints(schema, include_extras=True).items():
        options = _options(hint)
        inner = next((option for option in options if is_dataclass(option)), None)
        if type(None) in options and _is_off(config[key]):
            config[key] = None
        elif inner is not None:
            _turn_off(config[key], typing.cast(type, inner))


def _resolve(node: Any, path: str, problems: list[Problem]) -> Any:
    """A config as plain containers with interpolations resolved; what cannot be becomes a problem."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    plain: dict[Any, Any] = {}
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        where = f"{path}.{key}" if path else str(key)
        try:
            value = "???" if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException as error:
            text = str(error).splitlines()[0]
            if "MissingMandatoryValue" in text:  # told where it is missing
                continue
            missing = re.search(r"'([^']*)' not found", text)
            mend = (
                did_you_mean(missing[1], _paths(node._get_root()), "${", "}")
                if missing
                else "set the variable"
            )
            problems.append(Problem(f"{where}: {text}", mend))
            continue
        if value == "???" and where.count("."):
            problems.append(Problem(f"{where}: it must be given", f"write {where}=VALUE"))
        plain[key] = _resolve(value, where, problems)
    return plain if isinstance(node, DictConfig) else list(plain.values())


def _references(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    """The absolute keys that interpolations anywhere in an unresolved config refer to."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _references(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _references(value, (*path, str(index)))
    elif isinstance(node, str):
        for dots, key in re.findall(r"\$\{\s*(\.*)([\w.\[\]]+)\s*\}", node):
            yield ".".join([*path[: len(path) - len(dots)], key]) if dots else key


def _paths(config: Any) -> list[str]:
    """Every key of a config, dotted, at any depth."""
    found: list[str] = []
    plain = OmegaConf.to_container(config, resolve=False)

    def walk(node: Any, path: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if f"{path}{key}" != "hydra":
                found.append(f"{path}{key}")
                walk(value, f"{path}{key}.")

    walk(plain, "")
    return found


# ---------------------------------------------------------------------------------------- composition


@dataclass(frozen=True)
class Composed:
    """A checked config, and what Hydra says of how it came about."""

    config: DictConfig
    hydra: DictConfig
    overrides: list[str]


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The config that `trainkit OVERRIDES` trains.

    Args:
        overrides: as on the command line, such as `["optim=adam", "lr=0.01"]`.
        config_dir: a folder of configs besides ./conf.

    Raises:
        ConfigError: all that is wrong with it.
    """
    return compose_run(overrides, config_dir).config


def compose_run(overrides: Sequence[str] = (), config_dir: str | None = None) -> Composed:
    """As `compose`, with Hydra's own settings."""
    loader = make_loader(config_dir)
    problems: list[Problem] = []
    config: DictConfig | None
    try:
        config = loader.load_configuration("config", list(overrides), RunMode.RUN)
    except COMPOSITION_ERRORS as error:
        config, problems = _diagnose(loader, overrides, error)
    if config is None:
        raise ConfigError(*problems)
    HydraConfig.instance().set_config(config)  # for `${hydra:...}`
    OmegaConf.set_struct(config, False)
    hydra = config.pop("hydra")
    try:
        checked(config)
    except ConfigError as error:
        problems += error.problems
    if problems:
        wrong = ConfigError(*problems)
        wrong.config = config
        raise wrong
    return Composed(config, hydra, list(overrides))


def checked(config: DictConfig) -> DictConfig:
    """A composed config, checked, with every way to write off turned into None.

    Raises:
        ConfigError: all that is wrong with it.
    """
    problems = check(config)
    if problems:
        raise ConfigError(*problems)
    OmegaConf.set_struct(config, False)
    _turn_off(config, Schema)
    OmegaConf.set_struct(config, True)
    return config


def compose_sweep(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """Hydra's settings for a sweep whose every job was checked first.

    Raises:
        ConfigError: all that is wrong with any of the jobs.
    """
    problems: dict[Problem, None] = {}
    loader = make_loader(config_dir)
    try:
        master = loader.load_configuration("config", list(overrides), RunMode.MULTIRUN)
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except COMPOSITION_ERRORS as error:
        raise ConfigError(*_diagnose(loader, overrides, error, sweep=True)[1]) from error
    if "BasicSweeper" in master.hydra.sweeper._target_:  # others choose their jobs as they go
        for job in itertools.islice(itertools.product(*map(_values, parsed)), MOST_CHECKED_JOBS):
            try:
                compose_run(job, config_dir)
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(*problems)
    hydra: DictConfig = master.hydra
    return hydra


def _values(override: Override) -> list[str]:
    """An override once for each value that it sweeps over."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


# ------------------------------------------------------------------------------------- the command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line by Hydra's own parser; overrides and flags in any order.

    Raises:
        ConfigError: a flag that Hydra does not have.
    """
    parser = get_args_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    problems = []
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in known:
            key = flag.lstrip("-").replace("-", "_")
            near = nearest(flag, known)
            mend = f"keys have no dashes: write {key}=VALUE" if near is None else f"did you mean {near}?"
            problems.append(Problem(f"{word}: there is no such flag", mend))
    if problems:
        raise ConfigError(*problems)
    try:
        return parser.parse_intermixed_args(list(argv))
    except SystemExit as error:
        raise ConfigError(
            "the flags are incomplete (see above)", mend="trainkit --help lists them"
        ) from error


def show(args: argparse.Namespace) -> bool:
    """Answer a flag of Hydra's that only shows something; False where there is none."""
    if args.cfg == "job" and not args.package:
        config = compose_run(args.overrides, args.config_dir).config
        print(OmegaConf.to_yaml(config, resolve=args.resolve), end="")
    elif args.cfg or args.info or args.hydra_help or args.shell_completion:
        from hydra._internal.hydra import Hydra

        hydra_version.setbase("1.3")
        hydra = Hydra.create_main_hydra2("trainkit", search_path(args.config_dir))
        if args.shell_completion:
            hydra.shell_completion("config", args.overrides)
            return True
        if args.hydra_help:
            hydra.hydra_help("config", get_args_parser(), args)
            return True
        compose_run(args.overrides, args.config_dir)  # its errors are the better ones
        if args.cfg:
            hydra.show_cfg("config", args.overrides, args.cfg, args.package, args.resolve)
        else:
            hydra.show_info(args.info, "config", args.overrides, run_mode=RunMode.RUN)
    else:
        return False
    return True


def search_path(config_dir: str | None = None) -> ConfigSearchPath:
    """Where configs are looked for: the shipped ones first, then `config_dir`, then ./conf."""
    path = create_config_search_path(str(CONF))
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir}: there is no such folder", mend="name a folder of configs"
        )
    for folder in user_folders(config_dir):
        path.prepend("trainkit", f"file://{folder}", "schema")
    return path


def user_folders(config_dir: str | None = None) -> list[Path]:
    """The folders of the user's own configs, in the order they are searched."""
    folders = [Path(folder).resolve() for folder in (config_dir, "conf") if folder is not None]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir() and folder != CONF.resolve()]


def shadowed(config_dir: str | None = None) -> list[Path]:
    """The user's configs that go unread because trainkit ships one of that name."""
    return [
        file
        for folder in user_folders(config_dir)
        for file in sorted(folder.rglob("*.yaml"))
        if (CONF / file.relative_to(folder)).is_file()
    ]


def make_loader(config_dir: str | None = None) -> ConfigLoaderImpl:
    """Hydra's config loader over the search path."""
    hydra_version.setbase("1.3")
    setup_globals()
    return ConfigLoaderImpl(search_path(config_dir))


def _diagnose(
    loader: ConfigLoaderImpl, overrides: Iterable[str], error: Exception, *, sweep: bool = False
) -> tuple[DictConfig | None, list[Problem]]:
    """Why Hydra could not compose: each override judged alone; and the config without the wrong ones."""
    problems: list[Problem] = []
    groups: list[str] = []
    values: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            problems.append(
                Problem(
                    f"{text}: not of the form KEY=VALUE",
                    "write KEY=VALUE, and quote special characters: 'KEY=\"VALUE\"'",
                )
            )
            continue
        options = loader.get_group_options(override.key_or_group)
        if override.is_sweep_override() and not sweep:
            problems.append(
                Problem(
                    f"{text}: several values",
                    f"add -m to train each, or write {override.key_or_group}=[…] for a list",
                )
            )
        elif options and (wrong := [choice for choice in _choices(override) if choice not in options]):
            for choice in wrong:
                mend = did_you_mean(choice, options, f"{override.key_or_group}=")
                problems.append(Problem(f"{text}: {override.key_or_group} has no choice {choice!r}", mend))
        elif (options and _choices(override)) or override.is_hydra_override():
            groups.append(text)
        elif override.is_sweep_override():
            values += [OverridesParser.create().parse_override(value) for value in _values(override)]
        else:
            values.append(override)
    try:
        config = loader.load_configuration("config", groups, RunMode.MULTIRUN if sweep else RunMode.RUN)
    except COMPOSITION_ERRORS as wrong:
        return None, [*problems, _file_problem(loader, wrong)]
    for override in values:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
        except (HydraException, OmegaConfBaseException):
            problems.append(_key_problem(loader, config, override))
    return config, problems or [_file_problem(loader, error)]


def _choices(override: Override) -> list[str]:
    """The names an override of a group chooses: one, or several to sweep over."""
    if override.is_sweep_override():
        return [value.strip("'\"") for value in override.sweep_string_iterator()]
    value = override.value()
    return [value] if isinstance(value, str) else []


def _key_problem(loader: ConfigLoaderImpl, config: DictConfig, override: Override) -> Problem:
    key, text = override.key_or_group, str(override.input_line)
    parent, _, leaf = key.rpartition(".")
    if OmegaConf.select(config, key, throw_on_missing=False) is not None and not override.is_delete():
        return Problem(
            f"{text}: it has keys that {key} does not have", f"to add them write +{text.lstrip('+')}"
        )
    siblings = OmegaConf.select(config, parent) if parent else config
    inside = [str(k) for k in siblings if k != "hydra"] if isinstance(siblings, DictConfig) else []
    near = nearest(leaf, inside)
    close = (
        f"{parent}.{near}"
        if near and parent
        else near or nearest(key, [*_paths(config), *loader.list_groups("")])
    )
    hints = [f"did you mean {close}?"] if close else []
    if parent and key.partition(".")[0] in config:
        hints.append(f"to add a new key write +{text.lstrip('+')}")
    elif not close:
        hints.append(f"there is: {', '.join(inside)}")
    return Problem(f"{text}: there is no key {key!r}", "; ".join(hints))


def _file_problem(loader: ConfigLoaderImpl, error: Exception) -> Problem:
    """What is wrong inside a config file, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return Problem(f"{mark.name}, line {mark.line + 1}: {error.problem}", "mend the YAML there")
    cause = error if str(error) else error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    wanted = re.search(r"Could not find '([^']+)'", lines[0])
    mend = "run with fewer overrides to find the file that says so"
    if wanted:
        group, _, name = wanted[1].rpartition("/")
        mend = did_you_mean(name, loader.get_group_options(group), f"{group}: " if group else "")
    return Problem(" ".join(lines[:2]), mend)

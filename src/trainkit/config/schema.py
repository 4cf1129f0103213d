"""What a config may hold, and all that is wrong with one, as far as no import can tell."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.consistency import CHOICES, EXAMPLES, UNKNOWN, contradictions, is_off, missing_targets
from trainkit.config.targets import missing_source, targets
from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean

COUNTERS = ("total_steps", "steps_per_epoch")  # resolvers of `config`


@dataclass(frozen=True)
class Range:
    """The numbers that make sense: from `least` up, or those greater than `above`, below `below`."""

    least: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (
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
Positive = Annotated[float, Range(above=0)]
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
class Augment:
    """How training samples are changed at random, in batches on the device; see `trainkit.data.augment`."""

    flip: Literal["random", "alternating", True] | None
    crop: Count | None
    crop_fill: Literal["zeros", "edge", "reflect"]
    cutout: Count | None
    mixup: Positive | None
    cutmix: Positive | None


@dataclass
class Normalize:
    """(x - mean) / std, on inputs from 0 to 1; a number for all channels or one for each."""

    mean: float | list[float]
    std: Positive | list[Positive]


@dataclass
class Data:
    """The data sets; a data/*.yaml may add keys that its own values refer to."""

    train: Open
    val: Open | None
    split: Annotated[float, Range(above=0, below=1)] | None
    classes: Count | None
    normalize: Normalize | None
    augment: Augment | None
    cache: Literal["auto", "device", "memory", "none"] | None
    cache_limit: Positive | None
    num_workers: Annotated[int, Range(least=0)]
    on_error: Literal["stop", "skip"]


@dataclass
class Checkpoint:
    """When to save, and how many to keep."""

    every_epochs: Count | None
    every_steps: Count | None
    every_minutes: Positive | None
    keep: Count


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
    seed: Annotated[int, Range(least=0, below=2**63)]
    device: Annotated[str, Pattern(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:N or mps")]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    memory_format: Literal["auto", "contiguous", "channels_last"]
    compile: Literal[True, "default", "reduce-overhead", "max-autotune"] | None
    deterministic: bool | None
    clip_norm: Positive | None
    clip_value: Positive | None
    ema: Annotated[float, Range(above=0, below=1)] | None
    on_oom: Literal["auto", "split", "stop"]
    on_nonfinite: Literal["stop", "skip", "rollback"]
    limit_batches: Count | None
    watch: list[str]
    hooks: dict[str, Open]
    progress: Literal["auto", "rich", "tqdm", "plain", "off"]
    monitor: Monitor
    early_stop: EarlyStop | None
    checkpoint: Checkpoint | None


def check(config: DictConfig, defaults: DictConfig) -> list[Problem]:
    """All that is wrong with a composed config.

    Args:
        config: without Hydra's own node.
        defaults: conf/config.yaml, for the messages.
    """
    problems: list[Problem] = []
    plain = _resolve(config, "", problems)
    raw = OmegaConf.to_container(config, resolve=False)
    problems += _Checker(set(_references(raw, ())), defaults).mapping(plain, Schema, "")
    for path, node in targets(plain):
        problem = missing_source(node["_target_"])
        if problem:
            problems.append(Problem(f"{path}._target_={node['_target_']}: {problem.cause}", problem.hint))
    problems += [*missing_targets(plain), *contradictions(plain, raw)]
    return list(dict.fromkeys(problems))


def turn_off(config: DictConfig, schema: type | None = None) -> None:
    """Make every way to write off (off, false, null) None, in place."""
    for key, hint in typing.get_type_hints(schema or Schema, include_extras=True).items():
        options = _options(hint)
        inner = _dataclass(options)
        if type(None) in options and is_off(config[key]):
            config[key] = None
        elif inner is not None:
            turn_off(config[key], inner)


# ----------------------------------------------------------------------------------- values and ranges


@dataclass
class _Checker:
    """Holds values against the schema; `references` are the keys that something refers to."""

    references: set[str]
    defaults: DictConfig

    def mapping(self, value: Mapping[str, Any], schema: type, path: str) -> Iterator[Problem]:
        """What is wrong inside a mapping whose keys are those of a dataclass."""
        hints = typing.get_type_hints(schema, include_extras=True)
        for key, item in value.items():
            where = f"{path}{key}"
            if item is UNKNOWN:
                continue
            if key in hints:
                yield from self.value(item, hints[key], where)
            elif not any(name == where or name.startswith(f"{where}.") for name in self.references):
                cause = f"{where}: there is no such key, and nothing refers to it"
                hint = did_you_mean(str(key), hints, path)
                if where == "experiment":
                    hint = "begin the experiment's file with the line `# @package _global_`"
                yield Problem(cause, hint)
        for key in [key for key in hints if key not in value]:
            where = f"{path}{key}"
            hint = f"choose one: {where}={CHOICES[where]}" if where in CHOICES else f"write +{where}=VALUE"
            yield Problem(f"{where}: it is missing", hint)

    def value(self, value: Any, hint: Any, path: str) -> Iterator[Problem]:
        """What is wrong with a value that the schema says is `hint`."""
        options = _options(hint)
        inner = _dataclass(options)
        if value == "???":  # told as it was resolved
            return
        if type(None) in options and is_off(value):
            return
        if inner is not None and isinstance(value, dict):
            yield from self.mapping(value, inner, f"{path}.")
        elif not any(_fits(value, option) for option in options):
            words = " or ".join(_words(option) for option in options if option is not type(None))
            words += ", or off" * (type(None) in options and path != "lr")  # without one, few optimizers work
            yield Problem(f"{path}={value}: must be {words}", self.hint(value, options, path))

    def hint(self, value: Any, options: list[Any], path: str) -> str:
        """What to write instead."""
        inner = _dataclass(options)
        choices = [arg for option in options if typing.get_origin(option) is Literal for arg in typing.get_args(option)]
        if choices:
            return did_you_mean(str(value), choices, f"{path}=")
        if inner is not None:
            return f"write {path}.{fields(inner)[0].name}={'VALUE' if isinstance(value, bool) else value}"
        if typing.get_origin(options[0]) is list and not isinstance(value, list | dict):
            return f"write {path}=[{value}]"
        default = OmegaConf.select(self.defaults, path)
        if default is False or default is None:
            return EXAMPLES.get(path, f"to leave it out write {path}=off")
        return f"the default is {path}={default}" if isinstance(default, str | int | float) else "see --help"


def _options(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # Annotated | None gives the latter
    return list(typing.get_args(hint)) if union else [hint]


def _dataclass(options: list[Any]) -> type | None:
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


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


def _words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(args[1]) if args[0] is str else f"{_words(args[0])} {args[1]}"
    if origin is Literal:
        return " or ".join("true" if arg is True else str(arg) for arg in args)
    if origin is list:
        return f"a list, each {_words(args[0])}"
    return {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}.get(hint, "a mapping")


# ------------------------------------------------------------------------------------- interpolations


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
            plain[key] = UNKNOWN
            problem = _unresolved(where, str(error).splitlines()[0], node)
            problems += [problem] if problem else []
            continue
        if value == "???":
            problems.append(Problem(f"{where}: it must be given", f"write {where}=VALUE"))
        plain[key] = _resolve(value, where, problems)
    return plain if isinstance(node, DictConfig) else list(plain.values())


def _unresolved(where: str, text: str, node: Any) -> Problem | None:
    if "MissingMandatoryValue" in text:  # told where it is missing
        return None
    variable = re.search(r"Environment variable '([^']*)' not found", text)
    key = re.search(r"Interpolation key '([^']*)' not found", text)
    kind = re.search(r"Unsupported interpolation type (\w+)", text)
    hint = "write a value instead of ${…}"
    if variable:
        hint = f"set {variable[1]}, or give a default: ${{oc.env:{variable[1]},VALUE}}"
    elif kind:
        hint = did_you_mean(kind[1], COUNTERS, "${", ":}")
    elif key and key[1] in COUNTERS:
        hint = f"write it with a colon: ${{{key[1]}:}}"
    elif key:
        hint = did_you_mean(key[1], paths(node._get_root()), "${", "}")
    return Problem(f"{where}: {text}", hint)


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


def paths(config: Any) -> list[str]:
    """Every key of a config, dotted, at any depth."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if f"{path}{key}" != "hydra":
                found.append(f"{path}{key}")
                walk(value, f"{path}{key}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    return found

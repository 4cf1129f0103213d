"""The space of a search: the keys that a search chooses values for, in Hydra's syntax."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.core.errors import ConfigError, Problem

MAX_CHOICES = 10_000  # of a single key
MAX_GROUP_CHOICES = 200  # combinations of config files; a config is composed for each

WAYS = "write KEY=interval(LOW,HIGH), KEY=range(START,STOP) or KEY=1,2,3"

Value = float | int | str


@dataclass(frozen=True)
class Axis:
    """A key that the search chooses a value for.

    Attributes:
        key: as in an override, such as `lr` or `+optim.nesterov`.
        kind: float and int: a number from `low` to `high`, both included; choice: one of `choices`.
        low: the lowest number.
        high: the highest number.
        log: whether the logarithm of the number is sampled uniformly.
        step: the distance between two numbers; None: none for floats, 1 for whole numbers.
        choices: the values as in an override.
        is_group: whether the key chooses a config file, so that other keys may exist for some of its choices only.
    """

    key: str
    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[str, ...] = ()
    is_group: bool = False

    @property
    def name(self) -> str:
        """The key without signs."""
        return self.key.lstrip("+")

    @property
    def ends(self) -> list[Value]:
        """The first and the last value."""
        return [self.choices[0], self.choices[-1]] if self.kind == "choice" else [self.low, self.high]

    @property
    def values(self) -> list[Value] | None:
        """All values; None if they cannot be listed."""
        if self.kind == "choice":
            return [*self.choices]
        step = self.step or (1 if self.kind == "int" else None)
        if step is None or (self.high - self.low) / step >= MAX_CHOICES:
            return None
        return [self.low + place * step for place in range(int((self.high - self.low) / step + 1e-9) + 1)]

    def override(self, value: Value) -> str:
        """Return the override that sets the key to a value."""
        return f"{self.key}={value if isinstance(value, str) else repr(value)}"

    def as_dict(self) -> dict[str, Any]:
        """Return the axis as plain values, for the ledger."""
        if self.kind == "choice":
            return {"key": self.name, "kind": self.kind, "choices": [*self.choices]}
        numbers = {"key": self.name, "kind": self.kind, "low": self.low, "high": self.high, "log": self.log}
        return numbers if self.step is None else {**numbers, "step": self.step}


@dataclass
class Space:
    """What a search varies, and what all its jobs share.

    Attributes:
        axes: the keys that vary; those that choose config files come first.
        fixed: the other overrides.
        active: for each combination of group choices, the keys that exist.
    """

    axes: list[Axis]
    fixed: list[str]
    active: dict[tuple[str, ...], frozenset[str]] = field(default_factory=dict)

    @property
    def groups(self) -> list[Axis]:
        """The axes that choose config files."""
        return [axis for axis in self.axes if axis.is_group]

    @property
    def numbers_only(self) -> bool:
        """Whether all axes are numbers."""
        return all(axis.kind != "choice" for axis in self.axes)

    def axes_for(self, chosen: Sequence[str]) -> list[Axis]:
        """Return the other axes whose keys exist for these choices of `groups`."""
        existing = self.active[tuple(chosen)]
        return [axis for axis in self.axes if not axis.is_group and axis.key in existing]

    def combinations(self) -> list[dict[str, Value]]:
        """Return every setting of the space.

        Raises:
            ConfigError: the values of an axis cannot be listed.
        """
        endless = [axis for axis in self.axes if axis.values is None]
        if endless:
            raise ConfigError(
                *(
                    Problem(
                        f"search.sampler=grid: the values of {axis.name} cannot be listed",
                        f"list the values: {axis.name}=1,2,3, or use range",
                    )
                    for axis in endless
                )
            )
        found = []
        for chosen in itertools.product(*(axis.choices for axis in self.groups)):
            axes = self.axes_for(chosen)
            start = dict(zip((axis.name for axis in self.groups), chosen, strict=True))
            for values in itertools.product(*(axis.values or () for axis in axes)):
                found.append({**start, **dict(zip((axis.name for axis in axes), values, strict=True))})
        return found

    def samples(self) -> Iterator[list[str]]:
        """Yield the overrides of a few jobs that together use every choice and both ends of every axis."""
        for chosen in self.active:
            start = [axis.override(choice) for axis, choice in zip(self.groups, chosen, strict=True)]
            axes = self.axes_for(chosen)
            lists = [[*axis.choices] if axis.kind == "choice" else axis.ends for axis in axes]
            for place in range(max(map(len, lists), default=1)):
                values = [values[min(place, len(values) - 1)] for values in lists]
                yield [*self.fixed, *start, *(a.override(value) for a, value in zip(axes, values, strict=True))]


def read_space(loader: Any, overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> Space:
    """Return the space of a sweep. Which keys exist for which choices is not known yet; see `find_active`.

    Args:
        loader: Hydra's config loader.
        overrides: of the command line.
        params: `hydra.sweeper.params`: keys with values in the same syntax. The command line has precedence.

    Raises:
        ConfigError: everything that is wrong with the values.
    """
    found: dict[str, Override | str] = {}
    problems: list[Problem] = []
    for text in [*(f"{key}={value}" for key, value in (params or {}).items()), *overrides]:
        try:
            parsed = OverridesParser.create(config_loader=loader).parse_overrides([text])[0]
        except (HydraException, OmegaConfBaseException) as error:
            problem = describe_parse_error(text, error)
            problems += [] if problem is None else [problem]
            found[text] = text  # `find_active` reports other errors with the key
            continue
        found[parsed.get_key_element().lstrip("+")] = parsed
    axes: list[Axis] = []
    fixed: list[str] = []
    for override in found.values():
        if isinstance(override, str):
            fixed.append(override)
        elif override.is_sweep_override():
            try:
                axes.append(_axis(override, loader))
            except ConfigError as error:
                problems += error.problems
            except (HydraException, OmegaConfBaseException) as error:
                line = str(override.input_line)
                problems.append(describe_parse_error(line, error) or Problem(f"{line}: {error}", WAYS))
        elif not override.is_hydra_override() and not override.get_key_element().startswith(("hydra.", "search.")):
            fixed.append(str(override.input_line))
    if problems:
        raise ConfigError(*problems)
    return Space(sorted(axes, key=lambda axis: not axis.is_group), fixed)


def has_interval(overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> bool:
    """Return whether a key has an interval, whose values cannot be listed."""
    texts = [*overrides, *(f"{key}={value}" for key, value in (params or {}).items())]
    return any(isinstance(override.value(), IntervalSweep) for override in map(_parsed, texts) if override is not None)


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except (HydraException, OmegaConfBaseException):
        return None


def describe_parse_error(text: str, error: Exception) -> Problem | None:
    """Return what is wrong with the values of an override that Hydra cannot parse; None: it is not about values."""
    if "=" not in text:
        return None
    if isinstance(error, OmegaConfBaseException):  # Hydra fails to put an interval into a list
        return Problem(f"{text}: an interval or a range cannot be a value of a list", WAYS)
    cause = re.search(r"while evaluating '.*?': (.+)", str(error))
    return Problem(f"{text}: {cause[1]}", WAYS) if cause else None


def _axis(override: Override, loader: Any) -> Axis:
    """Return the axis of an override.

    Raises:
        ConfigError: the values are wrong.
    """
    key, value = override.get_key_element(), override.value()
    text = str(override.input_line)
    if isinstance(value, IntervalSweep | RangeSweep):
        tags = {str(tag) for tag in value.tags}
        if tags - {"log"}:
            raise ConfigError(f"{text}: unknown tag {', '.join(sorted(tags - {'log'}))}", hint="the only tag is log")
        if isinstance(value, IntervalSweep):
            return _interval(text, key, value, log="log" in tags)
        return _range(text, key, value, log="log" in tags)
    if override.value_type not in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
        raise ConfigError(f"{text}: not a choice, a range or an interval", hint="write KEY=1,2,3")
    if isinstance(value, ChoiceSweep):
        value.shuffle = False  # a resumed search must find the same list
    choices = list(dict.fromkeys(itertools.islice(override.sweep_string_iterator(), MAX_CHOICES + 1)))
    if len(choices) > MAX_CHOICES:
        raise ConfigError(f"{text}: more than {MAX_CHOICES:,} values", hint="use an interval or a range")
    if not choices:
        raise ConfigError(f"{text}: there is no value to choose", hint="write KEY=1,2,3")
    return Axis(key, "choice", choices=tuple(choices), is_group=loader.repository.group_exists(key.lstrip("+")))


def _interval(text: str, key: str, value: IntervalSweep, *, log: bool) -> Axis:
    low, high = value.start, value.end
    assert low is not None and high is not None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{text}: the ends must be finite", hint="write interval(LOW,HIGH)")
    if low >= high:
        hint = (
            f"give {key} a single value: {key}={low:.15g}" if low == high else f"write interval({high:.15g},{low:.15g})"
        )
        raise ConfigError(f"{text}: the interval is empty", hint=hint)
    _check_log(text, low, log=log)
    return Axis(key, "int" if isinstance(low, int) and isinstance(high, int) else "float", low, high, log)


def _range(text: str, key: str, value: RangeSweep, *, log: bool) -> Axis:
    if value.step == 0:
        raise ConfigError(f"{text}: the step is 0", hint="write range(START,STOP,STEP)")
    numbers = list(itertools.islice(value.range(), MAX_CHOICES + 1))
    if len(numbers) > MAX_CHOICES:
        raise ConfigError(f"{text}: more than {MAX_CHOICES:,} values", hint="use an interval, or a larger step")
    if not numbers:
        raise ConfigError(f"{text}: the range is empty", hint="write range(START,STOP), where STOP is left out")
    low, high = min(numbers), max(numbers)
    _check_log(text, low, log=log)
    whole = all(isinstance(number, int) for number in numbers)
    step = abs(value.step)
    if log and not (whole and step == 1):
        raise ConfigError(f"{text}: a log range needs whole numbers and step 1", hint="list the values: KEY=1,2,4")
    if whole:
        return Axis(key, "int", low, high, log, None if step == 1 else step)
    return Axis(key, "choice", choices=tuple(map(repr, numbers)))


def _check_log(text: str, low: float, *, log: bool) -> None:
    if log and low <= 0:
        raise ConfigError(
            f"{text}: a log interval must be above 0, and begins at {low:g}", hint="write a low end above 0"
        )


def find_active(space: Space, load: Any) -> list[Problem]:
    """Find which keys exist for each combination of group choices; return the problems.

    A key that exists for some choices only, such as `optim.momentum` for `optim=sgd`, is searched for these. A key
    that never exists is a problem.

    Args:
        space: is changed.
        load: composes a list of overrides; returns the config, or None, and the problems.
    """
    others = [axis for axis in space.axes if not axis.is_group]
    combinations = list(itertools.islice(itertools.product(*(a.choices for a in space.groups)), MAX_GROUP_CHOICES + 1))
    if len(combinations) > MAX_GROUP_CHOICES:
        return [Problem(f"the search has more than {MAX_GROUP_CHOICES} combinations of config files", "choose fewer")]
    problems: dict[Problem, None] = {}
    missing: dict[str, list[str]] = {}
    for chosen in combinations:
        start = [axis.override(choice) for axis, choice in zip(space.groups, chosen, strict=True)]
        config, found = load([*space.fixed, *start])
        problems |= dict.fromkeys(found)
        if config is None:
            continue
        written = mark_new_arguments([*space.fixed, *start, *(axis.override(axis.ends[0]) for axis in others)])
        existing = set()
        for axis, text in zip(others, written[len(written) - len(others) :], strict=True):
            if text.startswith("+") or _exists(config, axis.key):
                existing.add(axis.key)
            else:
                missing[axis.key] = [*space.fixed, *start, text]
        space.active[chosen] = frozenset(existing)
    for axis in others:
        if space.active and not any(axis.key in existing for existing in space.active.values()):
            problems |= dict.fromkeys(load(missing[axis.key])[1])
    return [*problems]


def _exists(config: DictConfig, key: str) -> bool:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
    return isinstance(node, DictConfig) and last in node

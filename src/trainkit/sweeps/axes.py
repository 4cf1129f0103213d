"""What differs between runs: choices of config groups, and config keys. Imports neither torch nor OmegaConf."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SEED = "seed"
RESERVED = (SEED, "n", "directory", "trial", "status", "epochs")  # names of other columns
MISSING = object()  # the value of a run that does not have the key
# Keys that change only what is shown and saved, or follow from another key.
UNCOMPARED = ("progress", "checkpoint", "logger", "report", "monitor.mode")
# The root keys that a choice of a group may set. Any other group may set every key, as experiments do.
OWNED = {
    "model": ("model",),
    "data": ("data",),
    "loss": ("loss",),
    "optim": ("optim", "lr", "param_groups"),
    "scheduler": ("scheduler",),
    "param_groups": ("param_groups",),
    "metrics": ("metrics",),
    "logger": ("logger",),
}


class HasConfig(Protocol):
    """What `find_axes` reads of a run."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The dotted keys with their values."""

    @property
    def choices(self) -> Mapping[str, str]:
        """The choice of each config group."""

    @property
    def overrides(self) -> Sequence[str]:
        """The overrides of the command line."""


@dataclass(frozen=True)
class Axis:
    """A config key, or a group of choices, with values that differ between runs.

    Attributes:
        key: the dotted key, or the name of the group.
        name: the shortest name that no other key has, such as `weight_decay`.
        is_group: whether the values are choices of a group.
    """

    key: str
    name: str
    is_group: bool = False

    def value(self, run: HasConfig) -> Any:
        """Return the value of a run; `MISSING` if its config does not have the key."""
        return choice(run, self.key) if self.is_group else run.config.get(self.key, MISSING)


def find_axes(runs: Sequence[HasConfig]) -> list[Axis]:
    """Return what differs between the runs, in the order of their overrides; the seed is not an axis.

    A key is not an axis if its values follow from a choice, as `optim.betas` from `optim=adam`. It is one if an
    override sets it, or if runs with the same choice have different values.
    """
    names = _group_names(runs)
    given = _overridden(runs, names)
    # Groups that were chosen on the command line come first, then those that may set other groups: experiments.
    groups = [Axis(name, name, is_group=True) for name in names]
    groups.sort(key=lambda group: (group.key not in given, group.key in OWNED))
    chosen: list[Axis] = []
    for group in groups:
        if _differs(group, runs) and (group.key in given or not _follows(group, chosen, runs)):
            chosen.append(group)
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    taken = [*keys, *names, *RESERVED]
    axes = []
    for key in keys:
        axis = Axis(key, short_name(key, taken))
        replaces = any(key == f"{name}._target_" for name in names)  # the choice of the group says it
        if key == SEED or replaces or _is_within(key, UNCOMPARED) or not _differs(axis, runs):
            continue
        if _is_within(key, given.keys() - set(names)) or not _follows(axis, chosen, runs):
            axes.append(axis)
    return sorted([*chosen, *axes], key=lambda axis: given.get(axis.key, len(given)))


def short_name(key: str, keys: Iterable[str]) -> str:
    """Return the shortest end of a dotted key that no other key of `keys` ends with."""
    others = [other for other in keys if other != key]
    parts = key.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[-length:])
        if not any(other == name or other.endswith(f".{name}") for other in others):
            return name
    return key


def identity(value: Any) -> Hashable:
    """Return a key that is equal for equal values: 1 and 1.0 are equal, 1 and True are not."""
    if isinstance(value, list):
        return ("list", *map(identity, value))
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return ("number", value)
    return (type(value).__name__, repr(value))


def choice(run: HasConfig, group: str) -> Any:
    """Return what a run chose for a group. An override of `_target_` is a choice too."""
    replaced = _assigned(run, f"{group}._target_")
    if replaced is not None:
        return replaced
    if group in run.choices:
        return run.choices[group]
    named = _assigned(run, group)  # Hydra's settings are missing
    return MISSING if named is None or named.startswith(("{", "[")) else named


def _group_names(runs: Sequence[HasConfig]) -> list[str]:
    """Return the names of all groups. Without Hydra's settings, an override names a group if its value is one."""
    names = dict.fromkeys(group for run in runs for group in run.choices)
    for run in runs:
        if not run.choices:
            roots = {key.partition(".")[0] for key in run.config if "." in key}
            names |= dict.fromkeys(key for key in map(_key_of, run.overrides) if key in roots or key in OWNED)
    return [name for name in names if name not in UNCOMPARED]


def _overridden(runs: Sequence[HasConfig], groups: Sequence[str]) -> dict[str, int]:
    """Return the keys and groups that overrides set, with their order. `optim._target_=…` sets the group `optim`."""
    found: dict[str, int] = {}
    for run in runs:
        for override in run.overrides:
            key = _key_of(override)
            group = key.removesuffix("._target_")
            found.setdefault(group if group in groups else key, len(found))
    return found


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _assigned(run: HasConfig, key: str) -> str | None:
    """Return the text that the last override of a key sets, or None."""
    values = [text.partition("=")[2] for text in run.overrides if _key_of(text) == key and "=" in text]
    return values[-1].strip("'\"") if values else None


def _differs(axis: Axis, runs: Sequence[HasConfig]) -> bool:
    first = axis.value(runs[0])
    values = (axis.value(run) for run in runs)
    return any(value is not first and identity(value) != identity(first) for value in values)


def _follows(axis: Axis, chosen: Sequence[Axis], runs: Sequence[HasConfig]) -> bool:
    """Return whether equal choices of the groups that may set an axis always give equal values."""
    owners = [group for group in chosen if _is_within(axis.key, OWNED.get(group.key, (axis.key,)))]
    values: dict[Hashable, Hashable] = {}
    for run in runs:
        choices = tuple(identity(group.value(run)) for group in owners)
        if values.setdefault(choices, identity(axis.value(run))) != identity(axis.value(run)):
            return False
    return bool(owners)


def _is_within(key: str, roots: Iterable[str]) -> bool:
    """Return whether a dotted key is one of the roots, or below one."""
    return any(key == root or key.startswith(f"{root}.") for root in roots)

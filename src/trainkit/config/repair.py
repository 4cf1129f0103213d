"""Replace the wrong values of a config, so that the rest of the config can still be checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.compose import Composed, compose_run
from trainkit.config.search_path import CONF
from trainkit.config.settings import Settings, read_settings
from trainkit.config.targets import find_wrong_targets
from trainkit.core.errors import ConfigError, Problem

ROUNDS = 5  # a replaced value may reveal another wrong value
# Parts that stand for a part that cannot be built. They are never used.
PLACEHOLDERS: dict[str, Any] = {
    "model": {"_target_": "torch.nn.Identity"},
    "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
    "optim": {"_target_": "torch.optim.SGD", "lr": 0.01},
    "scheduler": None,
    "training_step": "supervised",
    "evaluation_step": "supervised",
}
NAMED = ("hooks", "metrics", "logger", "param_groups")  # sections of named nodes
MONITOR = {"metric": "val/loss", "mode": "auto"}


@dataclass(frozen=True)
class Repaired:
    """A config as far as it can be used, and what is wrong with it.

    Attributes:
        composed: with the settings in which the wrong values are replaced; None: the config cannot be repaired.
        problems: everything that is wrong with the config.
        broken: the parts that cannot be built: `model`, `loss`, `optim`, `data`, `hooks.NAME` and so on.
    """

    composed: Composed | None
    problems: list[Problem] = field(default_factory=list)
    broken: frozenset[str] = frozenset()


def compose_and_repair(overrides: Sequence[str], config_dir: str | None = None) -> Repaired:
    """Compose a config, find everything that is wrong with it, and replace the wrong values.

    The targets are imported, and their arguments are checked.
    """
    try:
        composed = compose_run(overrides, config_dir)
        config, problems = composed.settings.source, []
    except ConfigError as error:
        problems = error.problems
        if error.composed is None:
            return Repaired(None, problems)
        config = error.composed.config
        composed = None
    repair = _Repair(config.copy())
    settings = repair.read(problems)
    for _ in range(ROUNDS):
        if settings is None:
            return Repaired(None, problems, frozenset(repair.broken))
        wrong = find_wrong_targets(OmegaConf.to_container(settings.source, resolve=True))
        if not wrong:
            break
        known = {key_of(problem) for problem in problems}
        problems = [*problems, *(problem for problem in wrong if key_of(problem) not in known)]
        settings = repair.read(wrong)
    if settings is None:
        return Repaired(None, problems, frozenset(repair.broken))
    given = composed or Composed(settings, list(overrides))
    return Repaired(replace(given, settings=settings), list(dict.fromkeys(problems)), frozenset(repair.broken))


def key_of(problem: Problem) -> str:
    """Return the config key that a problem names first, without its value; '' if it names none."""
    key = re.split(r": |=", problem.cause, maxsplit=1)[0].lstrip("+~")
    return key if re.fullmatch(r"[\w.\[\]-]+", key) else ""


class _Repair:
    """Replaces wrong values in a config, and notes the parts that cannot be built.

    Args:
        config: is changed.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.broken: set[str] = set()
        self.defaults: Any = OmegaConf.load(CONF / "config.yaml")
        OmegaConf.set_struct(config, False)

    def read(self, problems: Iterable[Problem]) -> Settings | None:
        """Replace the values that some problems name; return the settings, or None if that does not suffice."""
        for _ in range(ROUNDS):
            for problem in problems:
                self.reset(key_of(problem))
            try:
                return read_settings(self.config)
            except ConfigError as error:
                problems = error.problems
        return None

    def reset(self, key: str) -> None:
        """Replace the value of a key by its default, remove an argument, or replace the part that needs it."""
        part, _, rest = key.partition(".")
        node = re.sub(r"\[.*|\._target_$", "", key)
        if part in PLACEHOLDERS and (not rest or self._is_node(node) or part not in self.config):
            self.broken.add(part)
            self.config[part] = PLACEHOLDERS[part]
        elif part in NAMED and node.count(".") < 2:
            self._drop_named(part, node.partition(".")[2])
        elif part == "data" and (node in ("data", "data.train", "data.val") or key.endswith("._target_")):
            self._replace_data(node)
        elif key == "lr":  # its default is null, and a placeholder of the optimizer needs a number
            self.config.lr = 0.01
        elif key:
            self._set_default(key)

    def _replace_data(self, node: str) -> None:
        """Switch `data.val` off, or replace another data set by the digits."""
        if node == "data.val":
            self.broken.add("data.val")
            self.config.data.val = None
        else:
            self.broken.add("data")
            name = node.partition(".")[2].partition(".")[0] or "train"
            self.config.data[name] = {"_target_": "trainkit.data.digits"}

    def _is_node(self, key: str) -> bool:
        """Return whether a key holds a part with a `_target_`, or should hold one."""
        try:
            value = OmegaConf.select(self.config, key, throw_on_missing=False)
        except OmegaConfBaseException:
            return True
        return isinstance(value, DictConfig) and ("_target_" in value or "." not in key)

    def _drop_named(self, section: str, name: str) -> None:
        """Remove a hook, a metric, a logger or a rule; without a name, remove all of the section."""
        self.broken.add(f"{section}.{name}" if name else section)
        if name and isinstance(self.config.get(section), DictConfig):
            self.config[section].pop(name, None)
        else:
            self.config[section] = {}
        if section in ("hooks", "metrics"):  # the monitor may need what was removed
            self.config.monitor = MONITOR

    def _set_default(self, key: str) -> None:
        """Give a key its default; remove a key without a default, such as a wrong argument."""
        default = OmegaConf.select(self.defaults, key, throw_on_missing=False)
        parent, _, leaf = key.rpartition(".")
        owner = OmegaConf.select(self.config, parent) if parent else self.config
        if not isinstance(owner, DictConfig):
            return
        if OmegaConf.is_config(default) or default is not None or key in self.defaults:
            owner[leaf] = default
        else:
            owner.pop(leaf, None)

"""Typed settings: a checked config as frozen dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainkit.config.check import find_problems
from trainkit.config.consistency import BEST_MODES
from trainkit.config.hints import can_be_off, dataclass_of, field_name, hints_of, is_off, is_one_or_named
from trainkit.config.init_from import expand_short_forms
from trainkit.config.metrics import is_metric
from trainkit.config.resolvers import set_steps_per_epoch
from trainkit.config.schema import Node, RootKeys, named_nodes
from trainkit.config.targets import find_wrong_targets
from trainkit.core.errors import ConfigError, Problem


@dataclass(frozen=True)
class Settings(RootKeys):
    """The settings of a training. A key that is off is None, a node is a plain dict.

    `optim` and `scheduler` map names to nodes, see `OneOrNamed`. Values that depend on the data
    (`data.classes`, `${total_steps:}`, `${steps_per_epoch:}`) are None until `with_data` sets them.

    Attributes:
        source: the checked config, used by config/, build/instantiate and runs/ only.
    """

    source: DictConfig = field(repr=False, compare=False)

    def with_data(self, *, classes: int | None, steps_per_epoch: int | None = None) -> Settings:
        """Return settings in which the values that depend on the data are set.

        Args:
            classes: the number of classes in the data, used if `data.classes` is off.
            steps_per_epoch: the optimizer steps of one epoch.
        """
        if self.data.classes is not None and steps_per_epoch is None:
            return self
        source = self.source.copy()
        if self.data.classes is None:
            source.data.classes = classes
        if steps_per_epoch is not None:
            set_steps_per_epoch(source, steps_per_epoch)
        # `dataclasses.replace` may have changed other values, which must stay.
        merged: Settings = _merge(self, _from_source(self.source), _from_source(source))
        return dataclasses.replace(merged, source=source)

    def with_mode(self, mode: str) -> Settings:
        """Return settings with this `monitor.mode`, which may be auto until the metrics are built."""
        if mode == self.monitor.mode == self.source.monitor.mode:
            return self
        source = self.source.copy()
        source.monitor.mode = mode
        merged: Settings = _merge(self, _from_source(self.source), _from_source(source))
        return dataclasses.replace(merged, source=source)

    def with_init_path(self, path: str) -> Settings:
        """Return settings whose first weights come from this path."""
        source = self.source.copy()
        source.init_from.path = path
        assert self.init_from is not None
        return dataclasses.replace(self, init_from=dataclasses.replace(self.init_from, path=path), source=source)

    def with_teacher(self, directory: str) -> Settings:
        """Return settings whose training step learns from the run in this directory."""
        source = self.source.copy()
        source.training_step.teacher = directory
        return _from_source(source)

    @property
    def model_needs_classes(self) -> bool:
        """Whether the model refers to `data.classes`."""
        return "data.classes" in OmegaConf.to_yaml(self.source.model)

    def find_wrong_targets(self) -> list[Problem]:
        """Import each `_target_`; return what is wrong with the targets and their arguments."""
        return find_wrong_targets(OmegaConf.to_container(self.source, resolve=True))


def read_settings(config: DictConfig) -> Settings:
    """Check a composed config and return its settings. The config is not changed.

    Raises:
        ConfigError: everything that is wrong with the config.
    """
    is_root = OmegaConf.is_config(config) and config._get_parent() is None
    source: DictConfig = copy.deepcopy(config if is_root else OmegaConf.create(config))
    OmegaConf.set_struct(source, False)
    expand_short_forms(source)
    problems = find_problems(source)
    if problems:
        raise ConfigError(*problems)
    _turn_off(source, RootKeys)
    if source.init_from is not None and source.init_from.path is None:
        source.init_from = None
    if source.steps is not None:
        source.epochs = None
    metrics: Any = OmegaConf.to_container(source.metrics, resolve=True)
    if source.monitor.mode == "auto" and not is_metric(source.monitor.metric, metrics):  # its object says which
        source.monitor.mode = BEST_MODES[source.monitor.metric]
    OmegaConf.set_struct(source, True)
    return _from_source(source)


def _turn_off(config: DictConfig, schema: type) -> None:
    """Replace every way to write off (off, false, null) by None, in place."""
    for key, hint in hints_of(schema).items():
        inner = dataclass_of(hint)
        if can_be_off(hint) and is_off(config[key]):
            if config[key] is not None:  # an interpolation of a key that is off stays
                config[key] = None
        elif inner is not None:
            _turn_off(config[key], inner)


def _from_source(source: DictConfig) -> Settings:
    plain: Any = OmegaConf.to_container(source, resolve=True)
    return Settings(**_values(RootKeys, plain), source=source)


def _values(schema: type, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for the fields of a dataclass."""
    values: dict[str, Any] = {}
    for key, hint in hints_of(schema).items():
        value, inner = plain[key], dataclass_of(hint)
        if is_one_or_named(hint):
            value = named_nodes(value) if value else {}
        elif hint == dict[str, Node]:
            value = {str(name): node for name, node in value.items() if not is_off(node)}
        elif inner is not None and value is not None:
            value = inner(**_values(inner, value))
        values[field_name(key)] = value
    return values


def _merge(value: Any, before: Any, after: Any) -> Any:
    """Apply the difference between `before` and `after` to `value`, which may differ from both."""
    if before == after:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value) is type(before) is type(after):
        names = [f.name for f in dataclasses.fields(value) if f.compare]
        merged = {n: _merge(getattr(value, n), getattr(before, n), getattr(after, n)) for n in names}
        return dataclasses.replace(value, **merged)
    if isinstance(value, dict) and isinstance(before, dict) and isinstance(after, dict):
        return {key: _merge(item, before.get(key), after.get(key)) for key, item in value.items()}
    return after if value == before else value

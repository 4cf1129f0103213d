"""Hydra's config loader for the jobs of a sweep: composes each combination of group choices once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig

from trainkit.config.config_loader import ConfigLoader


class SweepLoader(ConfigLoader):
    """A loader that keeps what it has loaded, so that later jobs do not see changed files.

    Its configs equal those of Hydra's loader. The config of a job is a copy of the config of its group choices, to
    which Hydra's own function applies the job's values.

    Args:
        config_search_path: where the configs are.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository: ConfigRepository = _CachedRepository(config_search_path)
        self.bases: dict[tuple[str | None, tuple[str, ...]], bytes] = {}  # pickled: the fastest copy

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        def load(texts: list[str]) -> DictConfig:
            return super(SweepLoader, self)._load_configuration_impl(
                config_name, texts, run_mode, from_shell, validate_sweep_overrides
            )

        if run_mode is not RunMode.RUN:
            return load(overrides)
        parsed = OverridesParser.create().parse_overrides(overrides)
        values = [override for override in parsed if self._is_value(override)]
        shared = [str(override.input_line) for override in parsed if override not in values]
        if any(text.lstrip("+").startswith("hydra.searchpath") for text in shared) or _has_sweep(values):
            return load(overrides)
        key = (config_name, tuple(shared))
        if key not in self.bases:
            try:
                self.bases[key] = pickle.dumps(load(shared))
            except pickle.PicklingError:  # Hydra imports its plugins again in the processes of other launchers
                return load(overrides)
        config: DictConfig = pickle.loads(self.bases[key])
        self._apply_overrides_to_config(values, config)
        _record_overrides(config, parsed)
        return config

    def _is_value(self, override: Override) -> bool:
        """Return whether an override sets a value of the config. Others choose a group, or belong to Hydra."""
        chooses = self.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)
        return not (chooses or override.is_hydra_override())


def _has_sweep(values: Sequence[Override]) -> bool:
    return any(override.is_sweep_override() for override in values)


def _record_overrides(config: DictConfig, parsed: Sequence[Override]) -> None:
    """Write the overrides of a job into Hydra's node, as Hydra's loader does."""
    own = [override for override in parsed if not override.is_hydra_override()]
    config.hydra.overrides.hydra = [override.input_line for override in parsed if override.is_hydra_override()]
    config.hydra.overrides.task = [override.input_line for override in own]
    options = config.hydra.job.config.override_dirname
    config.hydra.job.override_dirname = get_overrides_dirname(
        overrides=own, kv_sep=options.kv_sep, item_sep=options.item_sep, exclude_keys=options.exclude_keys
    )


class _CachedRepository(ConfigRepository):
    """A repository that reads each config file once, and looks for each group once."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        self.loaded: dict[str, ConfigResult | None] = {}
        self.found: dict[tuple[str, Any], Any] = {}
        self.folders: list[Any] = []
        super().__init__(config_search_path)

    def __deepcopy__(self, memo: Any) -> _CachedRepository:
        """Return a repository that shares the cache. Hydra copies the repository for each job."""
        return copy.copy(self)

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        """Set the folders of the configs. Hydra calls this for each job, mostly with the same folders."""
        folders = [(folder.provider, folder.path) for folder in config_search_path.get_path()]
        if folders != self.folders:
            self.folders = folders
            self.loaded, self.found = {}, {}
            super().initialize_sources(config_search_path)

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Return a copy of a config, because Hydra changes the configs that it loads."""
        if config_path not in self.loaded:
            self.loaded[config_path] = super().load_config(config_path)
        return copy.deepcopy(self.loaded[config_path])

    def _find_object_source(self, config_path: str, object_type: ObjectType | None) -> Any:
        key = (config_path, object_type)
        if key not in self.found:
            self.found[key] = super()._find_object_source(config_path, object_type)
        return self.found[key]

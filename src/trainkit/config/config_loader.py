"""Hydra's config loader with the key `on` of a metric as it is written in a file."""

from __future__ import annotations

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, read_write


class ConfigLoader(ConfigLoaderImpl):
    """A loader of config files. YAML 1.1 reads the key `on` as true, and a metric has a key `on`."""

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        config: Any = result.config
        metrics: Any = config._get_node("metrics") if isinstance(config, DictConfig) else None
        for name in list(metrics) if isinstance(metrics, DictConfig) else ():
            node = metrics._get_node(name)
            if isinstance(node, DictConfig) and not node._is_none() and True in node.keys():  # noqa: SIM118
                with read_write(node):
                    node["on"] = node.pop(True)
        return result

"""The secrets of a run, which no file may contain."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from trainkit.core.redaction import environment_secrets, find_secrets


def secrets_of(config: DictConfig) -> set[str]:
    """Return the secrets that a config contains or refers to, and those of the environment."""
    values: set[str] = set()
    with _recorded_environment(values):
        resolved = _resolved(config)
    return literal_secrets(config) | set(find_secrets(resolved)) | values | set(environment_secrets())


def literal_secrets(config: DictConfig) -> set[str]:
    """Return the secrets that stand in a config itself."""
    return set(find_secrets(OmegaConf.to_container(config, resolve=False)))


def _resolved(node: Any) -> Any:
    """Return a config as plain containers, without the values that cannot be resolved yet."""
    if isinstance(node, DictConfig):
        return {str(key): _value(node, key) for key in node}
    if isinstance(node, ListConfig):
        return [_value(node, index) for index in range(len(node))]
    return node


def _value(node: Any, key: Any) -> Any:
    try:
        value = node[key]
    except OmegaConfBaseException:  # a value that only the data gives
        return None
    if OmegaConf.is_config(value) and OmegaConf.is_interpolation(node, key):  # the target may contain this node
        return None
    return _resolved(value)


@contextlib.contextmanager
def _recorded_environment(values: set[str]) -> Iterator[None]:
    """Add to `values` what each `${oc.env:NAME}` in the block gives, however the reference is written."""

    def record(name: str, *default: Any) -> Any:
        if name in os.environ:
            values.add(os.environ[name])
        return oc.env(name, *default)

    with environment_resolver(record):
        yield


@contextlib.contextmanager
def environment_resolver(resolver: Callable[..., Any]) -> Iterator[None]:
    """Resolve `${oc.env:NAME}` by another function in the block."""
    OmegaConf.register_new_resolver("oc.env", resolver, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)

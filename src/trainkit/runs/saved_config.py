"""Read the saved configs of many runs fast, as plain values. Imports neither torch nor OmegaConf.

The configs of a sweep share most of their lines. So a file is split at its root keys, and equal parts are parsed once.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from trainkit.core.errors import CheckpointError
from trainkit.core.leaves import leaves
from trainkit.runs.untrusted import HINT, YamlLoader, check_yaml, read_bytes, reported

ROOT_KEY = re.compile(r"(?m)^(?=[^\s#-])")  # the start of a line with a root key
CHOICES = re.compile(r"^    choices:\n((?:      .*\n?)*)", re.MULTILINE)  # in Hydra's settings
MAX_CACHED = 8192  # characters of a part that is kept

Leaf = tuple[str, Any]


def read_saved_config(directory: Path) -> dict[str, Any]:
    """Return the dotted keys of a run's config with their values. Lists and empty mappings are values.

    Interpolations such as `${lr}` stay as they are.

    Raises:
        CheckpointError: the config is missing or damaged.
    """
    path = directory / ".hydra" / "config.yaml"
    try:
        content = read_bytes(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", hint=HINT) from error
    with reported(path):
        text = content.decode()
        try:
            found = [leaf for part in ROOT_KEY.split(text) for leaf in _parse(part)]
        except (ValueError, yaml.YAMLError):  # trainkit did not write the file: a part alone may be no YAML
            found = list(_leaves_of(text))
        return dict(found)


def read_choices(directory: Path) -> dict[str, str]:
    """Return the choice of each config group, such as `optim: adam`; {} if Hydra's settings are missing or damaged."""
    path = directory / ".hydra" / "hydra.yaml"
    try:
        content = read_bytes(path)
        with reported(path):
            found = CHOICES.search(content.decode())
            choices = dict(_parse(found[1])) if found else {}
    except (FileNotFoundError, CheckpointError):
        return {}
    return {group: str(name) for group, name in choices.items() if name is not None and not group.startswith("hydra/")}


def _parse(part: str) -> tuple[Leaf, ...]:
    return _parse_cached(part) if len(part) <= MAX_CACHED else _leaves_of(part)


@lru_cache(maxsize=1024)
def _parse_cached(part: str) -> tuple[Leaf, ...]:
    return _leaves_of(part)


def _leaves_of(text: str) -> tuple[Leaf, ...]:
    """Return the leaves of a YAML mapping.

    Raises:
        ValueError: the text is not a mapping, or larger than a config; `yaml.YAMLError` if it is not YAML.
    """
    check_yaml(text)
    node = yaml.load(text, Loader=YamlLoader)  # a safe loader
    if node is None:
        return ()
    if not isinstance(node, dict):
        raise ValueError("it is not a mapping")
    return tuple(leaves(node))

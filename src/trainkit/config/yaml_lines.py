"""The lines of a config file on which its keys and the entries of its defaults list are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

MERGE = "tag:yaml.org,2002:merge"  # `<<: *anchor`


@dataclass(frozen=True)
class DefaultsEntry:
    """An entry of a defaults list.

    Attributes:
        name: the group as it is written, without `override` and `optional`; empty if the entry is a config's name.
        choice: the choice, or the config's name.
        override: whether the entry overrides a choice of another config.
        line: counted from 1.
    """

    name: str
    choice: Any
    override: bool
    line: int


class YamlLines:
    """The lines of a YAML text.

    Args:
        text: a config file that can be loaded.

    Attributes:
        keys: the line of each dotted key, counted from 1.
        defaults: the entries of the defaults list.
        start: the line on which the content starts.
    """

    def __init__(self, text: str) -> None:
        self.keys: dict[str, int] = {}
        self.defaults: list[DefaultsEntry] = []
        self._loader = get_yaml_loader()(text)  # the loader with which OmegaConf reads the file
        try:
            root = self._loader.get_single_node()
            self.start = 1 if root is None else root.start_mark.line + 1
            if isinstance(root, yaml.MappingNode):
                self._add_keys(root, "")
        finally:
            self._loader.dispose()

    def line_of(self, key: str) -> int | None:
        """Return the line of a dotted key, or of the nearest key that contains it. The whole text has the key ``."""
        if not key:
            return self.start
        while key and key not in self.keys:
            key = key.rpartition(".")[0]
        return self.keys.get(key)

    def _add_keys(self, node: yaml.MappingNode, path: str) -> None:
        for key_node, value in node.value:
            if key_node.tag == MERGE:
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._add_keys(merged, path)
        for key_node, value in node.value:
            if key_node.tag == MERGE:
                continue
            key = self._loader.construct_object(key_node, deep=True)
            if not path and key == "defaults" and isinstance(value, yaml.SequenceNode):
                self.defaults = list(self._entries(value))
                continue
            for name in {str(key), "on"} if key is True else {str(key)}:  # see `ConfigLoader`
                inner = f"{path}.{name}" if path else name
                self.keys[inner] = key_node.start_mark.line + 1
                if isinstance(value, yaml.MappingNode):
                    self._add_keys(value, inner)

    def _entries(self, node: yaml.SequenceNode) -> Iterator[DefaultsEntry]:
        for entry in node.value:
            content = self._loader.construct_object(entry, deep=True)
            line = entry.start_mark.line + 1
            if isinstance(content, str):
                yield DefaultsEntry("", content, False, line)
            elif isinstance(content, dict):
                for written, choice in content.items():
                    *words, name = str(written).split() or [""]
                    yield DefaultsEntry(name, choice, "override" in words, line)

"""The files of the configs that Hydra loads, with their lines."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from trainkit.config.origin import Origin
from trainkit.config.yaml_lines import YamlLines


@dataclass(frozen=True)
class ConfigPlace:
    """Where a config is.

    Attributes:
        name: the config path, such as `optim/sgd`.
        scheme: of the source that has it, such as `file`.
        file: None for a config without a file.
        lines: of the file.
    """

    name: str
    scheme: str
    file: Path | None = None
    lines: YamlLines | None = None

    def origin_of(self, key: str, package: str = "", via: str = "") -> Origin:
        """Return the origin of a key that this config sets.

        Args:
            key: the key in the whole config.
            package: the key at which the whole config has this config.
            via: who chose or included this config.
        """
        if self.file is None:
            by = "dotted path" if self.scheme == "dotted" else "Hydra"
            return Origin(by, self.name.partition("/")[2] if by == "dotted path" else self.name, via=via)
        own = f"{key}.".removeprefix(f"{package}.").rstrip(".") if package else key
        return Origin("file", "", self.file, self.lines.line_of(own) if self.lines is not None else None, via)


class ConfigFiles:
    """Finds the files of configs.

    Args:
        repository: of Hydra's loader.
    """

    def __init__(self, repository: Any) -> None:
        self.repository = repository
        self.found: dict[str, ConfigPlace] = {}

    def find(self, config_path: str) -> ConfigPlace:
        """Return the place of a config such as `optim/sgd`."""
        if config_path not in self.found:
            self.found[config_path] = self._find(config_path)
        return self.found[config_path]

    def _find(self, config_path: str) -> ConfigPlace:
        source = next((s for s in self.repository.get_sources() if s.is_config(config_path)), None)
        if source is None or source.scheme() not in ("file", "pkg"):
            return ConfigPlace(config_path, "" if source is None else source.scheme())
        root = Path(source.path) if source.scheme() == "file" else Path(str(package_files(source.path)))
        file = root / (config_path if config_path.endswith((".yaml", ".yml")) else f"{config_path}.yaml")
        return ConfigPlace(config_path, source.scheme(), file, YamlLines(file.read_text(encoding="utf-8")))

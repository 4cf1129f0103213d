"""Dotted paths as choices of a group: `optim=torch.optim.AdamW` means `_target_: torch.optim.AdamW`."""

from __future__ import annotations

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

DOTTED_GROUPS = ("model", "loss", "optim", "scheduler")


def is_dotted_path(name: object) -> bool:
    """Return whether a choice is written as a dotted path, and not as the name of a file."""
    if not isinstance(name, str) or name.endswith((".yaml", ".yml")):
        return False
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def is_dotted_choice(group: str, name: object) -> bool:
    """Return whether a group accepts dotted paths, and the name of a choice is one."""
    return group in DOTTED_GROUPS and is_dotted_path(name)


class DottedPathSource(ConfigSource):
    """A source of configs, last on Hydra's search path, that makes a config for each dotted path."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of this source on the search path."""
        return "dotted"

    def available(self) -> bool:
        """Return True, because this source reads no folder."""
        return True

    def is_group(self, config_path: str) -> bool:  # noqa: ARG002
        """Return False: the groups are folders of files."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Return whether a path such as `optim/torch.optim.AdamW` names a group and a dotted path."""
        group, _, name = config_path.partition("/")
        return is_dotted_choice(group, name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:  # noqa: ARG002
        """Return no choices, because every dotted path is a choice."""
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of a dotted path. An optimizer's config also sets the root's `lr` to null."""
        group, _, name = config_path.partition("/")
        node = {"_target_": name}
        content = {"lr": None, "optim": node} if group == "optim" else node
        header: dict[str, str | None] = {"package": "_global_" if group == "optim" else None}
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(content), header)

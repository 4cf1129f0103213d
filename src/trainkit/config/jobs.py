"""The configs of a sweep's jobs, with the node in which Hydra keeps its own settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.compose import Composed, drop_replaced
from trainkit.config.replaced_targets import remove_added_plus_signs
from trainkit.config.search_path import make_loader
from trainkit.config.settings import read_settings
from trainkit.config.targets import find_wrong_targets
from trainkit.core.errors import Problem


@dataclass
class ComposedJob:
    """The config of a job before it starts.

    Attributes:
        config: without Hydra's node.
        hydra: Hydra's node.
        overrides: the overrides of the job, as a user writes them.
    """

    config: DictConfig
    hydra: DictConfig
    overrides: list[str]

    def set_number(self, number: int) -> str:
        """Set the number of the job; return the name of its directory, `hydra.sweep.subdir`.

        Raises:
            ValueError: the name cannot be resolved.
        """
        OmegaConf.set_readonly(self.hydra, False)  # Hydra makes it read-only where it uses it
        self.hydra.job.id = self.hydra.job.num = number
        whole = OmegaConf.create({"hydra": self.hydra})
        HydraConfig.instance().set_config(whole)
        try:
            return str(whole.hydra.sweep.subdir)
        except OmegaConfBaseException as error:
            raise ValueError(str(error).partition("\n")[0]) from error

    def with_directory(self, sweep: Path, name: str) -> DictConfig:
        """Return the config with Hydra's node for the process of the job.

        Args:
            sweep: the directory of the sweep.
            name: the name of the job's directory.
        """
        OmegaConf.set_readonly(self.hydra, False)
        self.hydra.sweep.dir, self.hydra.sweep.subdir = str(sweep), name
        whole = self.config.copy()
        OmegaConf.set_struct(whole, False)
        whole.hydra = self.hydra
        return whole


def compose_job(loader: ConfigLoaderImpl, sweep: DictConfig, overrides: Sequence[str]) -> ComposedJob:
    """Compose a job of a sweep.

    Args:
        loader: the loader of the sweep.
        sweep: the config of the sweep, with Hydra's node.
        overrides: the overrides of the job, as Hydra's sweeper gives them.
    """
    config: DictConfig = loader.load_sweep_config(sweep, list(overrides))
    OmegaConf.set_struct(config, False)
    hydra = config.pop("hydra")
    written = remove_added_plus_signs(_texts(hydra.overrides.task))
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": hydra}))
    drop_replaced(config, written, hydra, loader)
    return ComposedJob(config, hydra, written)


def task_overrides(sweep: DictConfig) -> list[str]:
    """Return the overrides of a sweep, with their interpolations as they are written."""
    return _texts(sweep.hydra.overrides.task)


def typed_hydra() -> DictConfig:
    """Return Hydra's node with its default values. Hydra accepts only a node that it has made."""
    hydra: DictConfig = make_loader().load_configuration("config", [], RunMode.RUN).hydra
    return hydra


def restore_job(source: DictConfig, hydra: DictConfig, saved: Any) -> ComposedJob:
    """Return a job from its saved files.

    Args:
        source: the saved config.
        hydra: from `typed_hydra`.
        saved: the content of `.hydra/hydra.yaml`.

    Raises:
        ValueError: the file does not hold Hydra's node.
    """
    node = OmegaConf.create({"hydra": hydra})
    OmegaConf.set_struct(node, False)
    OmegaConf.set_readonly(node.hydra, False)
    try:
        node.merge_with(saved)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(str(error)) from error
    return ComposedJob(source.copy(), node.hydra, _texts(node.hydra.overrides.task))


def use_launcher(sweep: DictConfig, target: str) -> None:
    """Put a launcher before the chosen one, which becomes its argument `runner`.

    Args:
        sweep: the config of the sweep, with Hydra's node.
        target: the launcher's `_target_`.
    """
    chosen = sweep.hydra.launcher
    OmegaConf.set_struct(sweep.hydra, False)
    sweep.hydra.launcher = {"_target_": target, "_recursive_": False, "runner": chosen}


def use_sweeper(sweep: DictConfig, target: str, **arguments: Any) -> None:
    """Replace Hydra's sweeper by another, which gets the same `params`.

    Args:
        sweep: the config of the sweep, with Hydra's node.
        target: the sweeper's `_target_`.
        arguments: its further arguments.
    """
    OmegaConf.set_struct(sweep.hydra, False)
    sweep.hydra.sweeper = {"_target_": target, "params": sweep.hydra.sweeper.get("params"), **arguments}


def libraries_of(config: DictConfig) -> list[str]:
    """Return the large libraries, besides torch, that the `_target_`s of a config import."""
    text = OmegaConf.to_yaml(config)
    needed = {"torchvision": "torchvision", "timm": "timm"}
    return [library for target, library in needed.items() if f"_target_: {target}" in text]


def find_problems_of_jobs(configs: Iterable[DictConfig]) -> list[Problem]:
    """Return what is wrong with the `_target_`s of some configs. This imports the targets."""
    found: dict[Problem, None] = {}
    for config in configs:
        found |= dict.fromkeys(find_wrong_targets(OmegaConf.to_container(config, resolve=True)))
    return list(found)


@dataclass(frozen=True)
class Job:
    """A job of a sweep, as Hydra started it."""

    overrides: list[str]  # with their interpolations as they are written
    directory: Path  # of the run
    hydra: DictConfig

    @classmethod
    def current(cls) -> Job:
        """Return the job that Hydra runs at the moment."""
        hydra: Any = HydraConfig.get()
        return cls(remove_added_plus_signs(_texts(hydra.overrides.task)), Path(hydra.runtime.output_dir), hydra)

    def composed(self, config: DictConfig, config_dir: str | None = None, *, prepared: bool = False) -> Composed:
        """Return the checked settings of the job.

        Args:
            config: that Hydra composed; it is changed.
            config_dir: a folder of configs besides ./conf.
            prepared: the arguments of replaced `_target_`s are dropped already.

        Raises:
            ConfigError: everything that is wrong with the config.
        """
        OmegaConf.set_struct(config, False)
        notes: tuple[str, ...] = ()
        if not prepared:
            notes = drop_replaced(config, self.overrides, self.hydra, make_loader(config_dir))
        return Composed(read_settings(config), self.overrides, self.hydra, self.directory, notes)


def _texts(listed: Any) -> list[str]:
    plain: Any = OmegaConf.to_container(listed, resolve=False)
    return list(map(str, plain))

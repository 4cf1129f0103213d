"""Where Hydra finds configs: the shipped ones first, then `--config-dir`, then ./conf, then dotted paths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.core.errors import ConfigError

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.config_search_path import ConfigSearchPath

PACKAGE = Path(__file__).parents[1]
# A wheel contains the shipped configs inside the package, a checkout at its top.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"


def search_path(config_dir: str | None = None) -> ConfigSearchPath:
    """Return Hydra's search path of config folders.

    Raises:
        ConfigError: `config_dir` does not exist.
    """
    from hydra._internal.sources_registry import SourcesRegistry  # here, because `--help` needs no Hydra
    from hydra._internal.utils import create_config_search_path

    from trainkit.config.dotted_choices import DottedPathSource

    path = create_config_search_path(str(CONF))
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: the folder does not exist", hint="name a folder of configs")
    for folder in user_folders(config_dir):
        path.prepend("trainkit", f"file://{folder}", "schema")
    SourcesRegistry.instance().register(DottedPathSource)
    path.prepend("trainkit", "dotted://", "schema")
    return path


def user_folders(config_dir: str | None = None) -> list[Path]:
    """Return the folders of the user's configs, in the order of the search."""
    folders = [Path(folder).resolve() for folder in (config_dir, "conf") if folder is not None]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir() and folder != CONF.resolve()]


def ignored_configs(config_dir: str | None = None) -> list[tuple[Path, str]]:
    """Return the user's config files that Hydra does not read, each with the reason."""
    found = []
    for folder in user_folders(config_dir):
        for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            if file.suffix == ".yml":
                found.append((file, "the name of a config ends in .yaml; rename the file"))
            elif (CONF / file.relative_to(folder)).is_file():
                found.append((file, "trainkit ships a config of the same name; rename the file"))
    return found


def make_loader(config_dir: str | None = None) -> ConfigLoaderImpl:
    """Return Hydra's config loader for the search path."""
    from hydra import version as hydra_version
    from hydra.core.utils import setup_globals

    from trainkit.config.config_loader import ConfigLoader

    hydra_version.setbase("1.3")
    setup_globals()
    return ConfigLoader(search_path(config_dir))


def make_sweep_loader(config_dir: str | None = None) -> ConfigLoaderImpl:
    """Return the loader for the jobs of a sweep, see `SweepLoader`."""
    from trainkit.config.sweep_loader import SweepLoader

    return SweepLoader(make_loader(config_dir).get_search_path())

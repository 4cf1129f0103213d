"""A run's config once more: as it was saved, with values changed, its secrets given again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.diagnose import key_problem
from trainkit.config.search_path import CONF, make_loader
from trainkit.config.settings import Settings, read_settings
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.redaction import REDACTED
from trainkit.core.spelling import did_you_mean
from trainkit.runs.directory import Run


def reload_config(run: Run, overrides: Sequence[str], only: str = "") -> tuple[Settings, list[str]]:
    """A run's config with some values changed, and what `resume.allow` names; secrets are asked for inside `only`.

    Raises:
        ConfigError: something is wrong with it; where the run was begun in another folder, that is told.
    """
    try:
        return recomposed(run.config, overrides, run.directory / ".hydra" / "hydra.yaml", only)
    except ConfigError as error:
        folder = run.info.get("folder")
        if isinstance(folder, str) and Path(folder) != Path.cwd():
            error.problems.append(Problem(f"this run was begun in {folder}", "resume it there, if that is the cause"))
        raise


def recomposed(
    config: DictConfig, overrides: Sequence[str], hydra: Path | None = None, only: str = ""
) -> tuple[Settings, list[str]]:
    """A run's config once more, with values changed; and what `resume.allow` names among the overrides.

    Args:
        config: as the run saved it.
        overrides: `KEY=VALUE`, as on the command line; what was chosen by group stays chosen.
        hydra: the file of Hydra's settings then, for `${hydra:…}`.
        only: the part of the config whose secrets must be given again.

    Raises:
        ConfigError: all that is wrong with them.
    """
    loader = make_loader()
    if "${hydra:" in OmegaConf.to_yaml(config):
        whole = loader.load_configuration("config", [], RunMode.RUN)
        if hydra is not None and hydra.is_file():
            OmegaConf.set_struct(whole, False)
            whole.merge_with(OmegaConf.load(hydra))
        HydraConfig.instance().set_config(whole)
    OmegaConf.set_struct(config, True)
    allow: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        if text.startswith("resume.allow="):
            names = text.partition("=")[2].strip("[]'\"").split(",")
            allow += [name.strip() for name in names if name.strip()]
        else:
            problems += _change(config, text, loader)
    for key in (key for key in allow if key.partition(".")[0] not in config):
        near = did_you_mean(key, map(str, config))
        problems.append(Problem(f"resume.allow={key}: there is no such key", near))
    redacted_keys = _redacted_keys(OmegaConf.to_container(config, resolve=False))
    for key in (key for key in redacted_keys if key.startswith(only)):
        hint = f"write {key}=VALUE, or {key}='${{oc.env:NAME}}'"
        problems.append(Problem(f"{key}: a secret, which the run's files do not hold; give it again", hint))
    try:
        settings = read_settings(config)
        if not problems:
            return settings, allow
    except ConfigError as error:
        problems += error.problems
    raise ConfigError(*dict.fromkeys(problems))


def _change(config: DictConfig, text: str, loader: ConfigLoaderImpl) -> list[Problem]:
    """Apply an override to a config, in place; what is wrong with it."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [Problem(f"{text}: not of the form KEY=VALUE", "write KEY=VALUE")]
    key, value = override.key_or_group, override.value()
    if key == "scheduler" and value in ("none", "off"):
        config.scheduler = None
        return []
    if loader.get_group_options(key) and isinstance(value, str):
        hint = f"override single keys of it, or start a new run with {text}"
        return [Problem(f"{text}: a resumed run keeps its {key}", hint)]
    if key.startswith("resume"):
        return [Problem(f"{text}: there is no such key", "write resume.allow=[KEY,…]")]
    if override.is_sweep_override() or key.startswith("hydra."):
        return [Problem(f"{text}: it means nothing for one run that goes on", "leave it out")]
    defaults: Any = OmegaConf.load(CONF / "config.yaml")
    section = key.partition(".")[0]
    if key != section and config.get(section) is None and defaults.get(section) is not None:
        config[section] = defaults[section]  # it was off
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], config)
    except (HydraException, OmegaConfBaseException):
        return [key_problem(loader, config, override)]
    return []


def _redacted_keys(node: Any, path: str = "") -> list[str]:
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in _redacted_keys(value, f"{path}.{key}".lstrip("."))]
    return [path] if node == REDACTED or (isinstance(node, list) and REDACTED in node) else []

"""Reload the config of a saved run, with values changed and secrets given again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.diagnose import COMPOSITION_ERRORS, diagnose, key_problem
from trainkit.config.length import find_two_lengths
from trainkit.config.renamed import upgrade_saved_config
from trainkit.config.search_path import CONF, make_loader
from trainkit.config.settings import Settings, read_settings
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.machine import processes_to_start
from trainkit.core.rank_variables import is_rank
from trainkit.core.redaction import REDACTED
from trainkit.core.spelling import did_you_mean
from trainkit.runs.directory import Run
from trainkit.runs.interpolations import check_interpolations
from trainkit.runs.recovery import check_config, is_finished, recover_run
from trainkit.runs.untrusted import read_yaml

ALLOW = "resume.allow="
SAVED_CONFIG = "config"  # in resume.allow: use the saved config although it is not the one that the run wrote


@dataclass(frozen=True)
class Reloaded:
    """The settings of a saved run with some values changed, for a resume."""

    settings: Settings
    overrides: list[str]  # that changed values
    allow: list[str]  # keys that may differ from the checkpoint: `resume.allow`

    def processes_to_start(self) -> int:
        """Return how many processes a command starts; see `trainkit.core.machine.processes_to_start`.

        The ranks that torchrun started may be more or fewer than the saved number.
        """
        if is_rank() and not any(text.startswith("devices=") for text in self.overrides):
            return 1
        return processes_to_start(self.settings.devices, self.settings.device)


def read_for_resume(directory: Path, overrides: Sequence[str]) -> tuple[Run, Reloaded | None]:
    """Return the run in a directory, and its settings with overrides; None: the run is finished, and stays so.

    Raises:
        ConfigError: see `reload_config`.
        CheckpointError: see `reload_config`.
    """
    run = recover_run(directory)
    return run, None if is_finished(run) and not overrides else reload_config(run, overrides)


def reload_config(
    run: Run,
    overrides: Sequence[str],
    secrets_under: str | tuple[str, ...] = "",
    adapt: Callable[[DictConfig], object] | None = None,
) -> Reloaded:
    """Return the settings of a saved run, with overrides.

    Args:
        run: a saved run.
        overrides: `KEY=VALUE`, as on the command line, and `resume.allow=[KEY,…]`.
        secrets_under: secrets whose key starts with this text, or with one of these, must be given again.
        adapt: changes the saved config before the overrides do.

    Raises:
        ConfigError: everything that is wrong with the config. It names the folder where the run started, if that is
            another folder.
        CheckpointError: the saved config is damaged or was edited, and `resume.allow` does not contain `config`.
    """
    config = run.config
    if SAVED_CONFIG not in allowed_keys(overrides):
        check_config(run)
    try:
        upgrade_saved_config(config)
        if adapt is not None:
            adapt(config)
        return reload(config, overrides, run.directory / ".hydra" / "hydra.yaml", secrets_under)
    except ConfigError as error:
        folder = run.info.get("folder")
        if isinstance(folder, str) and Path(folder) != Path.cwd():
            hint = f"if that is the cause, run this there, or make its modules importable: sys.path.append({folder!r})"
            error.problems.append(Problem(f"this run started in {folder}", hint))
        raise


def reload(
    config: DictConfig, overrides: Sequence[str], hydra: Path | None = None, secrets_under: str | tuple[str, ...] = ""
) -> Reloaded:
    """Return the settings of a saved config, with overrides. Choices of groups stay.

    Args:
        config: the saved config; it is changed.
        overrides: see `reload_config`.
        hydra: the saved file of Hydra's settings, for `${hydra:…}`.
        secrets_under: see `reload_config`.

    Raises:
        ConfigError: everything that is wrong with the config.
        CheckpointError: its interpolations resolve to too much.
    """
    loader = make_loader()
    if "${hydra:" in OmegaConf.to_yaml(config):
        whole = loader.load_configuration("config", [], RunMode.RUN)
        if hydra is not None and os.path.lexists(hydra):
            OmegaConf.set_struct(whole, False)
            whole.merge_with(read_yaml(hydra))
        HydraConfig.instance().set_config(whole)
    check_interpolations(config)
    OmegaConf.set_struct(config, True)
    allow = allowed_keys(overrides)
    changes = [text for text in overrides if not text.startswith(ALLOW)]
    problems = [problem for text in changes for problem in _change(config, text, loader)]
    problems += find_two_lengths(changes, config)
    check_interpolations(config)  # an override may give a value that was missing
    for key in (key for key in allow if key.partition(".")[0] not in config and key != SAVED_CONFIG):
        near = did_you_mean(key, [*map(str, config), SAVED_CONFIG])
        problems.append(Problem(f"resume.allow={key}: this key does not exist", near))
    redacted = redacted_keys(OmegaConf.to_container(config, resolve=False))
    for key in (key for key in redacted if key.startswith(secrets_under)):
        hint = f"give it again: write {key}=VALUE, or {key}='${{oc.env:NAME}}'"
        problems.append(Problem(f"{key}: the value is a secret, and the files of the run do not contain it", hint))
    try:
        settings = read_settings(config)
        if not problems:
            return Reloaded(settings, changes, allow)
    except ConfigError as error:
        problems += error.problems
    raise ConfigError(*dict.fromkeys(problems))


def allowed_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys in the overrides `resume.allow=[KEY,…]`."""
    texts = [text.removeprefix(ALLOW).strip("[]'\"").split(",") for text in overrides if text.startswith(ALLOW)]
    return [name.strip() for names in texts for name in names if name.strip()]


def _change(config: DictConfig, text: str, loader: ConfigLoaderImpl) -> list[Problem]:
    """Apply an override to a config, in place; return what is wrong with the override."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [Problem(f"{text}: not of the form KEY=VALUE", "write KEY=VALUE")]
    key, value = override.key_or_group, override.value()
    if key == "scheduler" and value in ("none", "off"):
        config.scheduler = None
        return []
    if key in ("logger", "metrics") and isinstance(value, str | list):  # the groups that a resume may choose anew
        return choose_group(config, key, text, loader)
    if loader.get_group_options(key) and isinstance(value, str):
        hint = f"override single keys of {key}, or start a new run with {text}"
        return [Problem(f"{text}: a resumed run keeps its {key}", hint)]
    if key.startswith("resume"):
        return [Problem(f"{text}: this key does not exist", "write resume.allow=[KEY,…]")]
    if override.is_sweep_override() or key.startswith("hydra."):
        return [Problem(f"{text}: it has no meaning for the resume of one run", "remove it")]
    defaults: Any = OmegaConf.load(CONF / "config.yaml")
    section = key.partition(".")[0]
    if key != section and config.get(section) is None and defaults.get(section) is not None:
        config[section] = defaults[section]  # the saved config has it off
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], config)
    except (HydraException, OmegaConfBaseException):
        return [key_problem(loader, config, override)]
    return []


def choose_group(config: DictConfig, key: str, text: str, loader: ConfigLoaderImpl) -> list[Problem]:
    """Replace a section of a config by the choice of an override, in place; return what is wrong with the override."""
    try:
        config[key] = loader.load_configuration("config", [text], RunMode.RUN)[key]
        return []
    except COMPOSITION_ERRORS as error:
        return diagnose(loader, [text], error)[1]


def redacted_keys(node: Any, path: str = "") -> list[str]:
    """Return the dotted keys of the values in plain containers that were redacted."""
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in redacted_keys(value, f"{path}.{key}".lstrip("."))]
    return [path] if node == REDACTED or (isinstance(node, list) and REDACTED in node) else []

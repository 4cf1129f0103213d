"""Build each part of a training on its own, so that an error in a part does not hide the errors of other parts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.nn.parameter import is_lazy

from trainkit.build.data import Loaders, build_loaders
from trainkit.build.hooks import build_hook
from trainkit.build.loggers import build_logger
from trainkit.build.metrics import build_metric
from trainkit.build.model import build_loss, build_model, initialize_lazy_layers
from trainkit.build.optim import build_optimizers, build_schedulers
from trainkit.build.session import Session, build_session, unknown_watched_params
from trainkit.build.steps import build_steps
from trainkit.config.repair import NAMED, key_of
from trainkit.config.schema import METRICS, MonitorSettings
from trainkit.config.settings import Settings
from trainkit.core.device import select_device
from trainkit.core.errors import TrainkitError, UserCodeError
from trainkit.data.sample_errors import sample_error
from trainkit.engine.teacher import name_teacher
from trainkit.engine.warm_start import prepare_warm_start
from trainkit.optim.params import named_params

T = TypeVar("T")
CORE = frozenset({"model", "loss", "optim", "data", "training_step"})  # parts that a training needs
GUESSED_CLASSES = 10
# Sections that a training does not need, and their values without them.
OFF: dict[str, Any] = {"watch": [], "scheduler": {}, "init_from": None, "checkpoint": None, "ema": None}


def build_training(settings: Settings) -> tuple[Settings, Session]:
    """Build a training as `train` does; return its settings and its session."""
    settings, warm_start = prepare_warm_start(name_teacher(settings))
    return settings, build_session(settings, initialize=warm_start)


def build_parts(
    settings: Settings, broken: frozenset[str]
) -> tuple[tuple[Settings, Session] | None, list[TrainkitError]]:
    """Build a training; if that fails, build each part, and return all errors.

    A part whose requirements fail is not built.

    Args:
        settings: the settings of a training that may have errors.
        broken: parts that are placeholders, because the config names nothing that can be built.
    """
    errors: list[TrainkitError] = []
    if not broken & CORE:
        try:
            return build_training(settings), []
        except TrainkitError as error:
            errors.append(error)
    parts = _Parts(settings, set(broken))
    parts.build()
    return None, _with_first(errors, parts.errors)


def _with_first(first: list[TrainkitError], errors: list[TrainkitError]) -> list[TrainkitError]:
    """Return the errors of the parts, after those in `first` whose problems the errors do not contain."""
    found = {problem.cause for error in errors for problem in error.problems}
    return [error for error in first if any(problem.cause not in found for problem in error.problems)] + errors


@dataclass
class _Parts:
    """Builds the parts of a training."""

    settings: Settings
    broken: set[str]
    errors: list[TrainkitError] = field(default_factory=list)

    def attempt(self, key: str, function: Callable[..., T], *args: Any) -> T | None:
        """Call a function; if it raises an error, keep the error and return None."""
        try:
            return function(*args)
        except TrainkitError as error:
            self.errors.append(error)
        except Exception as error:
            self.errors.append(UserCodeError(key, error))
        return None

    def build(self) -> None:
        """Build every part whose requirements are met."""
        device = self.attempt("device", select_device, self.settings.device) or torch.device("cpu")
        settings, loaders = self._build_data(device)
        for name, node in settings.metrics.items():
            self.attempt(f"metrics.{name}", build_metric, name, node, device)
        model = None if "model" in self.broken else self.attempt("model", build_model, settings.model, device)
        if model is not None and loaders is not None:
            self.attempt("model", initialize_lazy_layers, model, loaders.train)
        loss = None if "loss" in self.broken else self.attempt("loss", build_loss, settings.loss)
        if model is not None and not any(map(is_lazy, model.parameters())):
            self._build_optimizers(settings, model, loss or torch.nn.Identity())
        self.attempt("training_step", build_steps, settings, device)
        for name, node in settings.hooks.items():
            self.attempt(f"hooks.{name}", build_hook, name, node)
        for name, node in settings.logger.items():
            self.attempt(f"logger.{name}", build_logger, name, node)

    def _build_data(self, device: torch.device) -> tuple[Settings, Loaders | None]:
        """Build the loaders and read a batch of each; return the settings with what the data decides.

        Without data, the number of classes is a guess: the names of the parameters do not depend on it.
        """
        built = None
        if "data" not in self.broken:
            built = self.attempt("data.train", build_loaders, self.settings, device, None)
        if built is None:
            return self.settings.with_data(classes=self.settings.data.classes or GUESSED_CLASSES), None
        settings, loaders = built
        for key, loader in (("data.train", loaders.train), ("data.val", loaders.val)):
            if loader is not None:
                self.attempt(key, _read_batch, loader, "data.train" if loaders.held_out else key)
                loader.close()
        return settings, loaders

    def _build_optimizers(self, settings: Settings, model: torch.nn.Module, loss: torch.nn.Module) -> None:
        """Build the optimizers and the schedulers, and find the names in `watch`."""
        named = self.attempt("model", named_params, model, loss)
        if named is None:
            return
        unknown = unknown_watched_params(settings.watch, [param.name for param in named])
        self.errors += [TrainkitError(problem) for problem in unknown]
        if "optim" in self.broken:
            return
        built = self.attempt("optim", build_optimizers, settings, named)
        if built is None:  # a rule of the param groups may be wrong, and the scheduler is independent of it
            built = _or_none(build_optimizers, replace(settings, param_groups={}), named)
        if built is not None:
            self.attempt("scheduler", build_schedulers, settings, built[0])


def _or_none(function: Callable[..., T], *args: Any) -> T | None:
    try:
        return function(*args)
    except Exception:
        return None


def _read_batch(loader: Any, key: str) -> None:
    """Read the first batch of a loader; an error names `key`."""
    try:
        next(iter(loader.batches(0)), None)
    except TrainkitError:
        raise
    except Exception as error:
        raise sample_error(key, error) from error


# ---------------------------------------------------------------------------------- the removal of parts


def keys_of(error: TrainkitError) -> list[str]:
    """Return the config keys that an error names."""
    return [error.key] if isinstance(error, UserCodeError) else [key_of(problem) for problem in error.problems]


def remove_parts(settings: Settings, keys: Collection[str]) -> Settings | None:
    """Return settings without some parts; None if a training needs one of the parts.

    Args:
        settings: the settings of a training.
        keys: config keys inside the parts.
    """
    for key in keys:
        removed = _remove(settings, key)
        if removed is None:
            return None
        settings = removed
    return settings


def _remove(settings: Settings, key: str) -> Settings | None:
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if key.startswith(("data.val", "evaluation_step")):
        return remove_validation(settings)
    if section in NAMED:
        nodes = getattr(settings, section)
        kept = {other: node for other, node in nodes.items() if other != name} if name in nodes else {}
        changed: dict[str, Any] = {section: kept}
        settings = replace(settings, **changed)
        return _with_known_monitor(settings) if section in ("hooks", "metrics") else settings
    if section == "monitor":
        return _monitor_training(settings)
    return replace(settings, **{section: OFF[section]}) if section in OFF else None


def _with_known_monitor(settings: Settings) -> Settings:
    """Return settings that monitor the training loss if a removed part may have reported the monitored metric."""
    return settings if settings.monitor.metric in METRICS else _monitor_training(settings)


def remove_validation(settings: Settings) -> Settings:
    """Return settings without a validation."""
    metrics = {
        name: {**node, "on": ["train"]} for name, node in settings.metrics.items() if "train" in str(node.get("on"))
    }
    return _monitor_training(replace(settings, evaluation_step=None, metrics=metrics))


def _monitor_training(settings: Settings) -> Settings:
    return replace(settings, monitor=MonitorSettings("train/loss", "min"))

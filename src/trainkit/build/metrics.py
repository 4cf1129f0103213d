"""Build the metrics that the config names, check their methods, and choose the mode of the monitored metric."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from trainkit.build.instantiate import call_target
from trainkit.config.consistency import BEST_MODES
from trainkit.config.metrics import parts_of
from trainkit.config.schema import Node
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.training.metric_set import MetricSet

METHODS = {"update": ["outputs", "targets"], "compute": [], "reset": []}  # method -> its arguments


def build_metrics(settings: Settings, device: torch.device) -> dict[str, MetricSet]:
    """Build the metrics of `train` and of `val`. A metric on both is built twice. The RNG states do not change.

    Raises:
        ConfigError: a metric lacks a method, or a method cannot be called with its arguments.
        UserCodeError: the metric raised another error.
    """
    built = {}
    for part in ("train", "val"):
        nodes = {name: node for name, node in settings.metrics.items() if part in parts_of(node)}
        with preserve_rng():
            built[part] = MetricSet(
                part, {name: build_metric(name, node, device) for name, node in nodes.items()}, device
            )
    return built


def build_metric(name: str, node: Node, device: torch.device) -> Any:
    """Build a metric on the device."""
    metric = call_target({key: value for key, value in node.items() if key != "on"}, f"metrics.{name}")
    for method, arguments in METHODS.items():
        wanted = f"def {method}({', '.join(['self', *arguments])})"
        found = getattr(metric, method, None)
        if not callable(found) or isinstance(metric, type):
            cause = f"metrics.{name}: {name_and_place(metric)} has no method {method}"
            raise ConfigError(cause, hint=f"write {wanted}")
        try:
            inspect.signature(found).bind(*arguments)
        except TypeError as error:
            cause = (
                f"metrics.{name}: {name_and_place(metric, method)}: {method} is called with ({', '.join(arguments)})"
            )
            raise ConfigError(f"{cause}: {error}", hint=f"write {wanted}") from error
        except ValueError:  # compiled code has no signature
            continue
    return metric.to(device) if callable(getattr(metric, "to", None)) else metric


def choose_mode(settings: Settings, metrics: Mapping[str, MetricSet]) -> str:
    """Return the mode of the monitored metric: `monitor.mode`, or that of the object if it is auto.

    Raises:
        ConfigError: the object does not say whether higher values are better.
    """
    if settings.monitor.mode != "auto":
        return settings.monitor.mode
    part, _, rest = settings.monitor.metric.partition("/")
    name, _, key = rest.partition("/")
    metric = metrics[part].metrics[name]
    if key and hasattr(metric, "keys") and key in metric:  # a collection of torchmetrics
        metric = metric[key]
    higher = getattr(metric, "higher_is_better", None)
    if higher is None and f"{part}/{name}" in BEST_MODES:
        return BEST_MODES[f"{part}/{name}"]
    if higher is None:
        cause = f"monitor.mode: auto does not cover {settings.monitor.metric}"
        kind = f"{type(metric).__name__} has no higher_is_better"
        raise ConfigError(f"{cause}, because {kind}", hint="write monitor.mode=min or monitor.mode=max")
    return "max" if higher else "min"

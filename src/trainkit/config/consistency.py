"""Find missing nodes and keys that contradict each other. Works on plain containers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from trainkit.config.hints import is_off
from trainkit.config.init_from import find_wrong_init_from
from trainkit.config.length import find_wrong_length
from trainkit.config.metrics import find_wrong_metrics, is_metric, metric_names
from trainkit.config.schema import METRICS, SUPERVISED, key_path, named_nodes
from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean

CHOICES = {"model": "toy_cnn", "data": "digits", "loss": "cross_entropy", "optim": "sgd"}
UNKNOWN = object()  # a value whose interpolation cannot be resolved, which is reported elsewhere
BEST_MODES = {"train/loss": "min", "train/loss_sum": "min", "val/loss": "min", "val/accuracy": "max"}  # metric -> mode
# The loggers whose package is an extra of the same name.
LOGGER_EXTRAS = {
    f"trainkit.runs.logger_backends.{name}": name.lower() for name in ("TensorBoard", "WandB", "MLflow", "Trackio")
}
EXAMPLES = {"lr": "for example lr=0.01", "data.split": "for example data.split=0.2"}


def find_missing_targets(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield each node that needs a `_target_` and has none."""
    nodes = {"loss": plain.get("loss"), **_paths("optim", plain.get("optim"))}
    nodes |= {f"hooks.{name}": node for name, node in _mapping(plain.get("hooks")).items()}
    nodes |= {f"metrics.{name}": node for name, node in _mapping(plain.get("metrics")).items() if not is_off(node)}
    nodes |= {f"logger.{name}": node for name, node in _mapping(plain.get("logger")).items() if not is_off(node)}
    nodes |= {f"data.{part}": _mapping(plain.get("data")).get(part) for part in ("train", "val")}
    if isinstance(plain.get("model"), dict):
        nodes |= _paths("model", plain["model"])
    if plain.get("scheduler"):
        nodes |= _paths("scheduler", plain["scheduler"])
    for path, node in nodes.items():
        if node is None or node is UNKNOWN or node == "???" or (isinstance(node, dict) and "_target_" in node):
            continue
        hint = f"choose one: {path}={CHOICES[path]}" if path in CHOICES else f"add +{path}._target_=a.dotted.Path"
        yield Problem(f"{path}: it has no _target_, so nothing can be built from it", hint)


def find_missing_packages(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield each metric and logger whose package is not installed. A folder of the package's name does not count."""
    for name, node in _mapping(plain.get("metrics")).items():
        is_torchmetrics = str(_mapping(node).get("_target_")).startswith("torchmetrics.")
        if is_torchmetrics and importlib.util.find_spec("torchmetrics") is None:
            hint = "install it: pip install torchmetrics"
            yield Problem(f"metrics.{name}: the package torchmetrics is not installed", hint)
    for name, node in _mapping(plain.get("logger")).items():
        package = LOGGER_EXTRAS.get(str(_mapping(node).get("_target_")))
        if package is not None:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                hint = f"install it: pip install {package}"
                yield Problem(f"logger.{name}: the package {package} is not installed", hint)


def find_contradictions(plain: Mapping[str, Any], raw: Any) -> Iterator[Problem]:
    """Yield keys that contradict each other.

    Args:
        plain: the config with resolved interpolations.
        raw: the config with its interpolations as they are written.
    """
    data, loss = (_mapping(plain.get(key)) for key in ("data", "loss"))
    if data.get("classes") == 1 and str(loss.get("_target_")).endswith(("CrossEntropyLoss", ".cross_entropy")):
        yield Problem("loss: cross entropy over one class is always 0", "choose a loss for numbers: loss=mse")
    augment = _mapping(data.get("augment"))
    mixing = [key for key in ("mixup", "cutmix") if not is_off(augment.get(key))]
    if mixing and str(loss.get("_target_")).endswith(("NLLLoss", ".nll_loss")):
        cause = f"data.augment.{mixing[0]}: it mixes targets into probabilities, which NLLLoss does not accept"
        yield Problem(cause, "write loss=cross_entropy, with a model that does not end in log_softmax")
    if loss.get("reduction") == "none":
        yield Problem("loss.reduction=none: a loss must be a single number", "write loss.reduction=mean")
    yield from find_wrong_length(plain, _mapping(raw))
    yield from find_wrong_init_from(plain.get("init_from"))
    yield from _learning_rates(plain.get("lr"), plain.get("optim"), raw)
    yield from _schedulers(_mapping(plain.get("scheduler")), _mapping(plain.get("optim")))
    if is_off(plain.get("lr")):
        for path in _uses_of_lr(_mapping(_mapping(raw).get("scheduler")), "scheduler"):
            yield Problem(f"{path}: it refers to lr, which is off", EXAMPLES["lr"])
    yield from _devices(plain.get("devices"), plain.get("device"))
    if plain.get("on_nonfinite") == "rollback" and is_off(plain.get("checkpoint")):
        cause = "on_nonfinite=rollback: it needs checkpoints, and checkpoint is off"
        yield Problem(cause, "remove checkpoint=off, or write on_nonfinite=skip")
    metrics = _mapping(plain.get("metrics"))
    yield from find_wrong_metrics(metrics)
    adding = [node for node in _mapping(plain.get("hooks")).values() if not is_off(node)]
    steps = [plain.get(key) for key in ("training_step", "evaluation_step")]
    adding += [step for step in steps if not is_off(step) and step != SUPERVISED]
    yield from _monitor(_mapping(plain.get("monitor")), metrics, user_adds_metrics=bool(adding))


def _devices(devices: Any, device: Any) -> Iterator[Problem]:
    """Yield a `device` that several processes cannot share."""
    if devices == "all" and device == "cpu":
        cause = "devices=all: it means all GPUs, and device=cpu uses none"
        yield Problem(cause, "write devices=N to train with N processes on the CPU")
    elif devices not in (1, UNKNOWN) and isinstance(device, str) and device.startswith(("cuda:", "mps")):
        yield Problem(f"devices={devices}: device={device} is a single device", "write device=auto or device=cpu")


def _monitor(monitor: Mapping[str, Any], metrics: Mapping[str, Any], *, user_adds_metrics: bool) -> Iterator[Problem]:
    """Yield a metric that is not computed, or a mode that does not fit the metric."""
    metric, mode = monitor.get("metric"), monitor.get("mode")
    if isinstance(metric, str) and is_metric(metric, metrics):  # the object says which mode fits
        return
    if isinstance(metric, str) and metric not in METRICS and metric != "???" and not user_adds_metrics:
        names = [*METRICS, *metric_names(metrics)]
        nearest = did_you_mean(metric, names, "monitor.metric=")
        hint = f"{nearest}; the key metrics, a hook and a custom step can add metrics"
        yield Problem(f"monitor.metric={metric}: trainkit does not compute {metric}", hint)
    best = BEST_MODES.get(str(metric))
    if mode == "auto" and isinstance(metric, str) and best is None and (metric in METRICS or user_adds_metrics):
        yield Problem(f"monitor.mode: auto does not cover {metric}", "write monitor.mode=min or monitor.mode=max")
    if best and mode in ("min", "max") and mode != best:
        yield Problem(f"monitor.mode={mode}: {metric} is best at its {best}", f"write monitor.mode={best}")


def _learning_rates(lr: Any, optim: Any, raw: Any) -> Iterator[Problem]:
    """Yield contradictions between the root's learning rate and the optimizers' learning rates."""
    nodes = {path: node for path, node in _paths("optim", optim).items() if "_target_" in _mapping(node)}
    uses = [path for path in nodes if "${" in str(_mapping(_at(raw, path)).get("lr"))]
    for path, node in nodes.items():
        own = node.get("lr", UNKNOWN)
        if own is not UNKNOWN and is_off(own):
            yield Problem(f"{'lr' if path in uses else path + '.lr'}: the optimizer needs a value", EXAMPLES["lr"])
    if is_off(lr) or lr is UNKNOWN or uses or not nodes:
        return
    (path, node), *more = nodes.items()
    if more:
        hint = f"write `lr: ${{lr}}` into {path}, or set {path}.lr"
        yield Problem(f"lr={lr}: no optimizer in optim uses it", hint)
    elif "lr" not in node:
        yield Problem(f"lr={lr}: the optim config does not use it", "write `lr: ${lr}` into the optim config")
    elif node["lr"] != lr and node["lr"] is not UNKNOWN:
        cause = f"optim.lr={node['lr']}: it differs from lr={lr} at the root"
        yield Problem(cause, f"write lr={node['lr']}; optim.lr follows it")


def _schedulers(scheduler: Mapping[str, Any], optim: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield schedulers with a wrong interval, or without an optimizer of their name."""
    for name, node in named_nodes(scheduler).items():
        if not isinstance(node, dict):
            continue
        path = key_path("scheduler", name)
        if name and (name not in optim or "_target_" in optim):
            optimizers = [key for key, value in optim.items() if isinstance(value, dict)]
            hint = did_you_mean(name, optimizers, "scheduler.")
            hint = hint or "name several optimizers under optim, or write a single scheduler"
            yield Problem(f"{path}: there is no optimizer of that name", hint)
        interval = node.get("interval", "epoch")
        if interval not in ("epoch", "step"):
            hint = did_you_mean(str(interval), ["epoch", "step"], f"{path}.interval=")
            yield Problem(f"{path}.interval={interval}: must be epoch or step", hint)
        elif interval == "step" and str(node.get("_target_")).endswith("ReduceLROnPlateau"):
            cause = f"{path}.interval=step: ReduceLROnPlateau needs the metric of an epoch"
            yield Problem(cause, f"write {path}.interval=epoch")
        yield from _check_inner_schedulers(path, node.get("schedulers", {}))


def _uses_of_lr(node: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the keys whose value is `${lr}`."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _uses_of_lr(value, f"{path}.{key}")
        elif value == "${lr}":
            yield f"{path}.{key}"


def _check_inner_schedulers(path: str, inner: Any) -> Iterator[Problem]:
    """Yield what is wrong with the schedulers inside a scheduler."""
    if not isinstance(inner, dict | list):
        hint = f"write {path}.schedulers: {{first: {{_target_: …}}, second: {{_target_: …}}}}"
        yield Problem(
            f"{path}.schedulers={inner}: must be a list of schedulers, or a mapping of names to schedulers", hint
        )
        return
    for key, child in inner.items() if isinstance(inner, dict) else enumerate(inner):
        if not isinstance(child, dict) or "_target_" not in child:
            hint = f"add a _target_, for example +{path}.schedulers.{key}._target_=torch.optim.lr_scheduler.LinearLR"
            yield Problem(f"{path}.schedulers.{key}: it has no _target_, so nothing can be built from it", hint)
        elif "interval" in child:
            cause = f"{path}.schedulers.{key}.interval: only the outer scheduler has an interval"
            yield Problem(cause, f"remove it, and write {path}.interval=…, which applies to all inner schedulers")


def _paths(key: str, node: Any) -> dict[str, Any]:
    """Return the nodes of a key by their key paths."""
    return {key_path(key, name): child for name, child in named_nodes(node).items()}


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = _mapping(node).get(key)
    return node


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

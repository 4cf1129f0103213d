"""What no key of a config shows alone: parts that are missing, keys that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean

CHOICES = {"model": "toy_cnn", "data": "digits", "loss": "cross_entropy", "optim": "sgd"}
UNKNOWN = object()  # stands for a value that could not be resolved, which is told already
EXAMPLES = {"lr": "for example lr=0.01", "data.split": "for example data.split=0.2"}


def is_off(value: Any) -> bool:
    """Whether a value is one of the ways to write off."""
    return value is None or value is False or value == "off"


def missing_targets(plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Where a `_target_` must stand and does not."""
    parts = {"loss": plain.get("loss"), **_named("optim", plain.get("optim"))}
    parts |= {f"hooks.{name}": node for name, node in _mapping(plain.get("hooks")).items()}
    parts |= {f"data.{part}": _mapping(plain.get("data")).get(part) for part in ("train", "val")}
    model, scheduler = plain.get("model"), plain.get("scheduler")
    if isinstance(model, dict) and "_target_" not in model:
        parts |= _named("model", model)
    if scheduler:
        parts |= _named("scheduler", scheduler)
    for path, node in parts.items():
        if node is None or node is UNKNOWN or node == "???" or (isinstance(node, dict) and "_target_" in node):
            continue
        hint = f"choose one: {path}={CHOICES[path]}" if path in CHOICES else f"add +{path}._target_=a.dotted.Path"
        yield Problem(f"{path}: it has no _target_, so nothing can be built of it", hint)


def _named(path: str, node: Any) -> dict[str, Any]:
    """A part that is built of one `_target_`, or each of its children where they are mappings."""
    several = isinstance(node, dict) and "_target_" not in node and any(isinstance(n, dict) for n in node.values())
    return {f"{path}.{name}": child for name, child in node.items()} if several else {path: node}


def contradictions(plain: Mapping[str, Any], raw: Any) -> Iterator[Problem]:
    """Keys that contradict each other."""
    data, loss = (_mapping(plain.get(key)) for key in ("data", "loss"))
    if data.get("classes") == 1 and str(loss.get("_target_")).endswith("CrossEntropyLoss"):
        yield Problem("loss: cross entropy over one class is always 0", "choose one for numbers: loss=mse")
    augment = _mapping(data.get("augment"))
    mixing = [key for key in ("mixup", "cutmix") if not is_off(augment.get(key))]
    if mixing and str(loss.get("_target_")).endswith("NLLLoss"):
        cause = f"data.augment.{mixing[0]}: its mixed targets are probabilities, which NLLLoss does not take"
        yield Problem(cause, "write loss=cross_entropy, with a model that ends in no log-softmax")
    if loss.get("reduction") == "none":
        yield Problem("loss.reduction=none: a loss must be one number", "write loss.reduction=mean")
    yield from _rates(plain.get("lr"), _mapping(plain.get("optim")), raw)
    yield from _schedulers(_mapping(plain.get("scheduler")), _mapping(plain.get("optim")))
    if plain.get("on_nonfinite") == "rollback" and is_off(plain.get("checkpoint")):
        cause = "on_nonfinite=rollback: without checkpoints there is nothing to go back to"
        yield Problem(cause, "leave out checkpoint=off, or write on_nonfinite=skip")
    monitor = _mapping(plain.get("monitor"))
    mode = "max" if monitor.get("metric") == "val/accuracy" else "min"
    if monitor.get("mode") in ("min", "max") and monitor["mode"] != mode:
        yield Problem(f"monitor: the best {monitor.get('metric')} is its {mode}", f"write monitor.mode={mode}")


def _rates(lr: Any, optim: Mapping[str, Any], raw: Any) -> Iterator[Problem]:
    """The root's learning rate and the optimizers' own."""
    nodes = {path: node for path, node in _named("optim", optim).items() if "_target_" in _mapping(node)}
    uses = [path for path in nodes if "${" in str(_mapping(_at(raw, path)).get("lr"))]
    for path, node in nodes.items():
        own = node.get("lr", UNKNOWN)
        if own is not UNKNOWN and is_off(own):
            yield Problem(f"{'lr' if path in uses else path + '.lr'}: the optimizer needs one", EXAMPLES["lr"])
    if is_off(lr) or lr is UNKNOWN or uses or not nodes:
        return
    (path, node), *more = nodes.items()
    if more:
        hint = f"write `lr: ${{lr}}` into {path}, or set {path}.lr"
        yield Problem(f"lr={lr}: no optimizer of optim uses it", hint)
    elif "lr" not in node:
        yield Problem(f"lr={lr}: the optim config does not use it", "write `lr: ${lr}` into the optim config")
    elif node["lr"] != lr and node["lr"] is not UNKNOWN:
        cause = f"optim.lr={node['lr']}: it is not the lr={lr} of the root"
        yield Problem(cause, f"write lr={node['lr']}; optim.lr follows it")


def _schedulers(scheduler: Mapping[str, Any], optim: Mapping[str, Any]) -> Iterator[Problem]:
    """When each scheduler steps, and whether there is an optimizer of its name."""
    nodes = _named("scheduler", scheduler)
    for path, node in ((path, node) for path, node in nodes.items() if isinstance(node, dict)):
        name = path.partition(".")[2]
        if name and (name not in optim or "_target_" in optim):
            there = [key for key, value in optim.items() if isinstance(value, dict)]
            hint = did_you_mean(name, there, "scheduler.") or "name several optimizers under optim, or one scheduler"
            yield Problem(f"{path}: there is no optimizer of that name", hint)
        interval = node.get("interval", "epoch")
        if interval not in ("epoch", "step"):
            hint = did_you_mean(str(interval), ["epoch", "step"], f"{path}.interval=")
            yield Problem(f"{path}.interval={interval}: must be epoch or step", hint)
        elif interval == "step" and str(node.get("_target_")).endswith("ReduceLROnPlateau"):
            yield Problem(f"{path}.interval=step: a plateau shows in epochs", f"write {path}.interval=epoch")
        inside = node.get("schedulers", {})
        if not isinstance(inside, dict | list):
            hint = f"write {path}.schedulers: {{first: {{_target_: …}}, second: {{_target_: …}}}}"
            yield Problem(f"{path}.schedulers={inside}: must be a list of schedulers, or a mapping", hint)
        named = inside.items() if isinstance(inside, dict) else enumerate(inside) if isinstance(inside, list) else ()
        for key, child in named:
            if not isinstance(child, dict) or "_target_" not in child:
                hint = f"add +{path}.schedulers.{key}._target_=torch.optim.lr_scheduler.LinearLR"
                yield Problem(f"{path}.schedulers.{key}: it has no _target_, so nothing can be built of it", hint)
            elif "interval" in child:
                hint = f"write {path}.interval=…, which holds for all inside"
                yield Problem(f"{path}.schedulers.{key}.interval: only the scheduler around it has one", hint)


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = _mapping(node).get(key)
    return node


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

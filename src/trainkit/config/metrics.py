"""The metrics of a config: where each is computed, its names in the history, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean

PARTS = ("train", "val")
TAKEN = ("loss", "loss_sum", "samples", "skipped", "scale")  # names of trainkit's own metrics


def parts_of(node: Any) -> tuple[str, ...]:
    """Return the parts of the data on which a metric is computed: the values of its key `on`."""
    on = node.get("on", "val") if isinstance(node, Mapping) else "val"
    return (on,) if isinstance(on, str) else tuple(on)


def metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics in the history, such as `val/f1`. A metric may add `/KEY` to its name."""
    nodes = {name: node for name, node in metrics.items() if isinstance(node, Mapping)}
    return [f"{part}/{name}" for name, node in nodes.items() if not _wrong_on(node) for part in parts_of(node)]


def is_metric(name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a name in the history is that of a metric, or may be an entry of its mapping."""
    return any(name == known or name.startswith(f"{known}/") for known in metric_names(metrics))


def find_wrong_metrics(metrics: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield metrics with a name that is taken, or a wrong `on`."""
    for name, node in metrics.items():
        if not isinstance(node, Mapping):
            continue
        if name in TAKEN:
            yield Problem(f"metrics.{name}: trainkit reports a {name} of its own", f"choose another name: my_{name}")
        if "/" in str(name):
            yield Problem(f"metrics.{name}: a name of a metric has no /", f"write {str(name).replace('/', '_')}")
        wrong = _wrong_on(node)
        if wrong:
            hint = did_you_mean(wrong, PARTS) or f"write metrics.{name}.on=[train,val]"
            yield Problem(f"metrics.{name}.on={node['on']}: must be val, train or [train, val]", hint)


def _wrong_on(node: Mapping[str, Any]) -> str:
    """Return a wrong value in `on`, else an empty string."""
    on = node.get("on", ["val"])
    values = [on] if isinstance(on, str) else on
    if not isinstance(values, list) or not values:
        return str(on)
    return next((str(value) for value in values if value not in PARTS), "")

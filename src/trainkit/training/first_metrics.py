"""A hook that tries the validation of custom parts after the first step, long before the first validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from trainkit.core.rng import preserve_rng
from trainkit.data.prepare import Batch
from trainkit.training.carried import capture_carried, carrying_modules, reset_carried, restore_carried
from trainkit.training.evaluation import evaluate_batch
from trainkit.training.loop import monitored_value
from trainkit.training.state import State


class FirstMetrics:
    """A hook that ends a new training after its first step if its validation fails.

    The metrics may not take the outputs, or a custom step may not fit the validation.

    Args:
        example: returns a batch of the validation data.
    """

    def __init__(self, example: Callable[[], Batch]) -> None:
        self.example = example
        self.done = False

    def on_start(self, state: State) -> None:
        """Try nothing in a resumed training."""
        self.done = state.progress.step > 0

    def on_step(self, state: State) -> None:
        """Try the metrics after the first step, whose own errors come first."""
        if not self.done:
            self.done = True
            try_metrics(state, *self.example())


@torch.no_grad()
def try_metrics(state: State, inputs: Any, targets: Any) -> None:
    """Evaluate one batch, and update the metrics with it. The state of the training does not change."""
    objects = state.objects
    (model, loss_fn), metrics = objects.evaluated, objects.val_metrics
    modes = [(module, module.training) for part in (model, loss_fn) for module in part.modules()]
    buffers = capture_carried([model, loss_fn])
    with preserve_rng():
        model.eval()
        loss_fn.eval()
        reset_carried(carrying_modules(model) if objects.carrying else [])
        for _, part_targets, outputs in evaluate_batch(state, inputs, targets, keep=bool(metrics)).kept:
            metrics.update(outputs, part_targets)
        check_monitored(state)
    metrics.reset()
    restore_carried(buffers)
    for module, mode in modes:
        module.training = mode


def check_monitored(state: State) -> None:
    """Check that the monitored metric is a number if the key `metrics` reports it.

    Raises:
        ConfigError: it is a list or a mapping, or a key of a metric that is not a mapping.
    """
    monitor, metrics = state.settings.monitor, state.objects.val_metrics
    part, name, *_ = [*monitor.split("/"), ""]
    if part != metrics.part or name not in metrics.metrics:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = metrics.compute()
    except Exception:  # some metrics have no value for a few samples
        return
    found = f"{part}/{name}"
    if monitor in values or monitor == found or found in values:  # the keys of a mapping may depend on the samples
        monitored_value(monitor, {"train/loss": 0.0, "val/loss": 0.0, **values})

"""A hook that tries the metrics of the validation after the first step, long before the first validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from trainkit.core.rng import preserve_rng
from trainkit.data.prepare import Batch
from trainkit.training.carried import capture_carried, carrying_modules, reset_carried, restore_carried
from trainkit.training.custom_training import required_outputs
from trainkit.training.loop import monitored_value
from trainkit.training.metric_set import detach
from trainkit.training.state import State


class FirstMetrics:
    """A hook that ends a new training after its first step if the metrics do not take the outputs of the validation.

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
    """Update the metrics of the validation with one batch. The state of the training does not change."""
    objects = state.objects
    model, metrics = objects.evaluated[0], objects.val_metrics
    modes, buffers = [(module, module.training) for module in model.modules()], capture_carried([model])
    with preserve_rng():
        model.eval()
        reset_carried(carrying_modules(model) if objects.carrying else [])
        metrics.update(detach(validation_outputs(state, inputs, targets)), targets)
        check_monitored(state)
    metrics.reset()
    restore_carried(buffers)
    for module, mode in modes:
        module.training = mode


def validation_outputs(state: State, inputs: Any, targets: Any) -> Any:
    """Return the outputs for a batch, as the validation computes them."""
    (model, loss_fn), step = state.objects.evaluated, state.objects.evaluation_step
    with state.objects.autocast:
        if step is None:
            return model(inputs)
        return required_outputs(step, step.result(step(model, inputs, targets, loss_fn, state.progress)))


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

"""A hook that tries the validation on one batch after the first step, long before the first validation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from trainkit.core.modes import evaluating
from trainkit.core.rng import preserve_rng
from trainkit.data.prepare import Batch
from trainkit.training.carried import capture_carried, carrying_modules, reset_carried, restore_carried
from trainkit.training.evaluation import evaluate_batch
from trainkit.training.loop import monitored_value
from trainkit.training.state import State


class TrialValidation:
    """A hook that ends a new training after its first step if its validation would fail.

    For example, a metric may not support the outputs, or the evaluation step may not fit the validation data.

    Args:
        example: returns a batch of the validation data.
    """

    def __init__(self, example: Callable[[], Batch]) -> None:
        self.example = example
        self.done = False

    def on_start(self, state: State) -> None:
        """Skip the trial in a resumed training."""
        self.done = state.progress.step > 0

    def on_step(self, state: State) -> None:
        """Try the validation after the first step, so that an error of the step itself is reported first."""
        if not self.done:
            self.done = True
            try_validation(state, *self.example())


def try_validation(state: State, inputs: Any, targets: Any) -> None:
    """Evaluate one batch, and update the metrics with it. The state of the training does not change."""
    objects = state.objects
    (model, loss_fn), metrics = objects.evaluated, objects.val_metrics
    buffers = capture_carried([model, loss_fn])
    steps = {key: copy.deepcopy(step.state_dict()) for key, step in objects.steps_with_state.items()}
    with preserve_rng(), evaluating(model, loss_fn):
        reset_carried(carrying_modules(model) if objects.carrying else [])
        for _, part_targets, outputs in evaluate_batch(state, inputs, targets, keep_outputs=bool(metrics)).kept:
            metrics.update(outputs, part_targets)
        check_monitored(state)
    metrics.reset()
    restore_carried(buffers)
    for key, saved in steps.items():
        objects.steps_with_state[key].load_state_dict(saved)


def check_monitored(state: State) -> None:
    """Check that the monitored metric is a number if the key `metrics` reports it.

    Raises:
        ConfigError: the monitored metric is a list or a mapping, or the monitor names a key of a metric that is not
            a mapping.
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

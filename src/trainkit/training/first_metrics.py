"""A hook that tries the metrics of the validation after the first step, long before the first validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainkit.core.rng import preserve_rng
from trainkit.data.prepare import Batch
from trainkit.training.carried import capture_carried, carrying_modules, reset_carried, restore_carried
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
        """Try nothing in a resumed training, or without metrics."""
        self.done = state.progress.step > 0 or not state.objects.val_metrics

    def on_step(self, state: State) -> None:
        """Try the metrics after the first step, whose own errors come first."""
        if not self.done:
            self.done = True
            try_metrics(state, *self.example())


@torch.no_grad()
def try_metrics(state: State, inputs: Any, targets: Any) -> None:
    """Update the metrics of the validation with one batch. The state of the training does not change.

    `compute` is not called, because some metrics have no value for a few samples.
    """
    objects = state.objects
    model, metrics = objects.evaluated[0], objects.val_metrics
    modes, buffers = [(module, module.training) for module in model.modules()], capture_carried([model])
    with preserve_rng():
        model.eval()
        reset_carried(carrying_modules(model) if objects.carrying else [])
        with objects.autocast:
            outputs = model(inputs)
        metrics.update(detach(outputs), targets)
    metrics.reset()
    restore_carried(buffers)
    for module, mode in modes:
        module.training = mode

"""The learning-rate range test: train while the learning rate rises, and suggest the rate of the steepest descent.

The test is Leslie Smith's (https://arxiv.org/abs/1506.01186, section 3.3). The steepest descent as the suggestion is
fastai's. The curve is smoothed with a centred Gaussian kernel, because an average over past steps alone would lag.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainkit.core.errors import ConfigError, NonFiniteError
from trainkit.core.pytree import batch_size_of
from trainkit.data.loaders import Loader
from trainkit.diagnostics.batches import endless_batches
from trainkit.training.hooks import call_hooks
from trainkit.training.loop import train_step
from trainkit.training.objects import new_loss_mean
from trainkit.training.oom import run_with_oom_split
from trainkit.training.state import State

KERNEL_WIDTH = 0.03  # standard deviation of the smoothing kernel, as a fraction of the steps
MIN_SIGNAL = 5  # a decrease of the loss must be this many times the noise of the smoothed curve
MOMENTUM = 0.9  # of the moving average that detects divergence
MAX_RISE = 4  # the test ends if the moving average has risen this many times its largest decrease


@dataclass
class RangeTest:
    """The loss at each learning rate, measured before the update with that rate."""

    ratios: dict[str, float]  # param group -> its learning rate / the tested learning rate
    kernel_width: float  # standard deviation of the smoothing kernel, in steps
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: bool = False

    def smoothed(self) -> list[float]:
        """Return the losses, smoothed with a centred Gaussian kernel."""
        radius = math.ceil(4 * self.kernel_width)
        kernel = [math.exp(-((offset / self.kernel_width) ** 2) / 2) for offset in range(-radius, radius + 1)]
        means = []
        for center in range(len(self.losses)):
            first = max(0, center - radius)
            window = self.losses[first : center + radius + 1]
            weights = kernel[first - center + radius :][: len(window)]
            means.append(sum(w * loss for w, loss in zip(weights, window, strict=True)) / sum(weights))
        return means

    def suggestion(self) -> float | None:
        """Return the rate at which the smoothed loss decreases fastest; None if the loss does not decrease.

        Only the descent counts: from the last step at the initial level (less a tenth of the decrease) to the
        minimum. A decrease within the noise of the curve does not count.
        """
        smoothed = self.smoothed()
        lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
        level = statistics.median(smoothed[: max(1, min(lowest, len(smoothed) // 5))])
        decrease = level - smoothed[lowest]
        if decrease <= MIN_SIGNAL * self._noise(smoothed, lowest):
            return None
        begin = max((step for step in range(lowest) if smoothed[step] >= level - 0.1 * decrease), default=0)
        descent = range(max(1, begin), min(lowest + 1, len(smoothed) - 1))
        # Central differences, because the rates are evenly spaced on a logarithmic axis.
        return self.rates[max(descent, key=lambda step: smoothed[step - 1] - smoothed[step + 1], default=lowest)]

    def _noise(self, smoothed: list[float], lowest: int) -> float:
        """Return the standard deviation of the smoothed curve, estimated from the residuals before the minimum.

        1.48 x the median absolute residual is a robust standard deviation. A Gaussian kernel of width w divides the
        standard deviation by sqrt(2 sqrt(pi) w).
        """
        residuals = [abs(loss - mean) for loss, mean in zip(self.losses, smoothed, strict=True)][: lowest + 1]
        return 1.48 * statistics.median(residuals) / math.sqrt(2 * math.sqrt(math.pi) * self.kernel_width)

    def result(self) -> dict[str, Any]:
        """Return the suggestion and the curve in plain containers."""
        best = self.suggestion()
        return {
            "suggestion": best,
            "groups": {name: None if best is None else best * ratio for name, ratio in self.ratios.items()},
            "rates": self.rates,
            "losses": self.losses,
            "smoothed": self.smoothed(),
            "diverged": self.diverged,
        }


def range_test(
    state: State, loader: Loader, lr: float | None, start: float, end: float, steps: int, hooks: Sequence[Any] = ()
) -> RangeTest:
    """Train for at most `steps` steps while the learning rate rises from `start` to `end` by a constant factor.

    The param groups keep the ratios of their learning rates. The trained weights are useless afterwards.

    Args:
        state: the state of a training that has not started.
        loader: the loader of the training data.
        lr: the config's learning rate, the base of the ratios; None for the default of the first optimizer.
        start: the first learning rate.
        end: the last learning rate.
        steps: at least 2.
        hooks: get `on_start` and `on_step`.

    Raises:
        ConfigError: `lr` is 0, or a param group has no learning rate.
        NonFiniteError: the loss of the first step is not finite.
    """
    groups = state.objects.optimizer.param_groups
    test = RangeTest(_ratios(state, lr), max(1.0, KERNEL_WIDTH * steps))
    divergence = _Divergence()
    progress = state.progress
    state.objects.trained.train()
    state.settings = replace(
        state.settings, epochs=1, steps=None, max_minutes=None, check_steps=False
    )  # a non-finite loss only ends the test
    progress.batches = steps
    call_hooks(hooks, "on_start", state)
    for step, (inputs, targets) in zip(range(steps), endless_batches(loader), strict=False):
        rate = start * (end / start) ** (step / (steps - 1))
        for group in groups:
            group["lr"] = rate * test.ratios[group["name"]]
        progress.loss = new_loss_mean(state.objects)
        run_with_oom_split(train_step, state, inputs, targets, hooks)
        progress.batch = progress.step = step + 1
        progress.seen += batch_size_of(inputs)
        call_hooks(hooks, "on_step", state)
        loss = progress.loss.item()
        if math.isfinite(loss):
            test.rates.append(rate)
            test.losses.append(loss)
        if not math.isfinite(loss) or divergence.detect(loss):
            test.diverged = True
            break
    if not test.rates:
        raise NonFiniteError("the loss is not finite in the first step", hint="look for NaN in the data and the model")
    return test


def _ratios(state: State, lr: float | None) -> dict[str, float]:
    """Return for each param group its learning rate divided by `lr`."""
    groups = state.objects.optimizer.param_groups
    without = [str(group["name"]) for group in groups if group.get("lr") is None]
    if without:
        cause = f"param group {without[0]} has no learning rate to test"
        raise ConfigError(cause, hint="choose an optimizer with a learning rate, for example optim=sgd")
    base = float(lr if lr is not None else state.objects.optimizer.defaults.get("lr") or 0)
    if base == 0:
        cause = "lr=0: the learning rates of the param groups have no ratio to 0"
        raise ConfigError(cause, hint="write a learning rate above 0, for example lr=0.01")
    return {group["name"]: float(group["lr"]) / base for group in groups}


class _Divergence:
    """Detects that the moving average of the loss has risen far above its minimum."""

    def __init__(self) -> None:
        self.average, self.correction = 0.0, 1.0
        self.first = self.lowest = math.nan

    def detect(self, loss: float) -> bool:
        """Add a loss; return whether the losses diverge."""
        self.average = MOMENTUM * self.average + (1 - MOMENTUM) * loss
        self.correction *= MOMENTUM
        mean = self.average / (1 - self.correction)  # without the bias of the start at 0
        if math.isnan(self.first):
            self.first = self.lowest = mean
        self.lowest = min(self.lowest, mean)
        return mean > self.lowest + MAX_RISE * max(self.first - self.lowest, abs(self.lowest))

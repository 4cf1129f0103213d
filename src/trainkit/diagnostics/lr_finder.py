"""The learning-rate range test: the rate rises step by step, and the loss tells which ones work.

The test is Leslie Smith's (https://arxiv.org/abs/1506.01186, section 3.3), the steepest fall as the
suggestion is fastai's. The curve is smoothed to both sides: a mean of the past would lag behind.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainkit.core.errors import ConfigError, NonFiniteError
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.training.hooks import call_hooks
from trainkit.training.loop import train_step
from trainkit.training.losses import is_sum
from trainkit.training.metrics import Mean
from trainkit.training.oom import run_with_oom_split
from trainkit.training.state import State

WIDTH = 0.03  # of the bell curve that smooths, in shares of the steps
SCATTER = 5  # a fall counts from so many times the smoothed curve's own scatter
PAST = 0.9  # weight of the past in the moving average that tells when to end
RISE = 4  # the test ends where that average has risen so many times as far as it had fallen


@dataclass
class RangeTest:
    """The losses at the learning rates tried, each before the update at that rate."""

    ratios: dict[str, float]  # of each param group's rate to the one that is tried
    width: float  # of the smoothing, in steps
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: bool = False

    def smoothed(self) -> list[float]:
        """The losses, each as a mean of those around it."""
        reach = math.ceil(4 * self.width)
        bell = [math.exp(-((place / self.width) ** 2) / 2) for place in range(-reach, reach + 1)]
        means = []
        for middle in range(len(self.losses)):
            first = max(0, middle - reach)
            inside = self.losses[first : middle + reach + 1]
            weights = bell[first - middle + reach :][: len(inside)]
            means.append(sum(w * loss for w, loss in zip(weights, inside, strict=True)) / sum(weights))
        return means

    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest on its way down; None where it does not fall.

        The way down begins where the loss was last as high as at the start, a tenth of the fall aside.
        What does not stand out of the curve's own scatter is no fall.
        """
        smoothed = self.smoothed()
        lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
        level = statistics.median(smoothed[: max(1, min(lowest, len(smoothed) // 5))])
        fall = level - smoothed[lowest]
        apart = [abs(loss - mean) for loss, mean in zip(self.losses, smoothed, strict=True)][: lowest + 1]
        scatter = 1.48 * statistics.median(apart) / math.sqrt(2 * math.sqrt(math.pi) * self.width)
        if fall <= SCATTER * scatter:
            return None
        begin = max((place for place in range(lowest) if smoothed[place] >= level - 0.1 * fall), default=0)
        way = range(max(1, begin), min(lowest + 1, len(smoothed) - 1))
        # Central differences; the rates are evenly spaced in their logarithm.
        return self.rates[max(way, key=lambda place: smoothed[place - 1] - smoothed[place + 1], default=lowest)]

    def found(self) -> dict[str, Any]:
        """All of it in plain containers."""
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
    """Train for at most `steps` steps, the rate rising from `start` to `end` by the same factor each time.

    The param groups keep their ratios to `lr` (None: to the first optimizer's own). The weights are of
    no use afterwards.

    Raises:
        ConfigError: `lr` is 0, or an optimizer has none.
        NonFiniteError: the loss is from the first step.
    """
    groups = state.objects.optimizer.param_groups
    base = float(lr if lr is not None else state.objects.optimizer.defaults.get("lr") or 0)
    if base == 0 or any(group.get("lr") is None for group in groups):
        raise ConfigError(f"lr={base:g}: the param groups have no ratio to it", hint="leave out lr, or give another")
    test = RangeTest({group["name"]: float(group["lr"]) / base for group in groups}, max(1.0, WIDTH * steps))
    means: list[float] = []
    average = 0.0
    state.objects.trained.train()
    state.settings = replace(state.settings, epochs=1, check_steps=False)  # a loss that runs away ends the test
    state.progress.batches, state.progress.samples = steps, round(steps * loader.samples / len(loader))
    call_hooks(hooks, "on_start", state)
    for number, (inputs, targets) in zip(range(steps), _endless(loader), strict=False):
        rate = start * (end / start) ** (number / (steps - 1))
        for group in groups:
            group["lr"] = rate * test.ratios[group["name"]]
        state.progress.loss = Mean(state.objects.device, summed=is_sum(state.objects.loss_fn))
        run_with_oom_split(train_step, state, inputs, targets, hooks)
        state.progress.batch, state.progress.step = number + 1, number + 1
        call_hooks(hooks, "on_step", state)
        loss = state.progress.loss.item()
        if not math.isfinite(loss):
            test.diverged = True
            break
        test.rates.append(rate)
        test.losses.append(loss)
        average = PAST * average + (1 - PAST) * loss
        means.append(average / (1 - PAST ** (number + 1)))
        if means[-1] > min(means) + RISE * max(means[0] - min(means), abs(min(means))):
            test.diverged = True
            break
    if not test.rates:
        raise NonFiniteError("the first batch's loss is not finite", hint="look for NaN in the data and the model")
    return test


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.batches(epoch)
        epoch += 1

"""The progress of a training: its counts, its running loss and its best epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainkit.training.metrics import Mean, Metrics

MAX_COUNT = 2**53  # counts up to here are exact in JSON


@dataclass
class Progress:
    """How far the training is. Counts of batches, samples and seconds are those of the current epoch."""

    loss: Mean
    means: dict[str, Mean] = field(default_factory=dict)  # further numbers of a custom step, by name
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer updates done
    batch: int = 0  # batches done
    batches: int = 0  # batches of a whole epoch
    samples: int | None = 0  # samples of a whole epoch; None: unknown
    seen: int = 0  # samples trained on
    samples_of_batch: int = 0  # of the current batch, on all ranks together
    tokens_of_batch: Tensor | int = 0
    largest_share: int = 0  # samples of the current batch on the rank that has most of them
    smallest_share: int = 0  # the same on the rank that has fewest
    tokens: Tensor | int = 0  # tokens trained on, if the inputs are token ids
    skipped: int = 0  # batches skipped because of a non-finite loss or gradient
    unreadable: dict[str, dict[int, str]] = field(default_factory=dict)  # train, val -> sample -> why it was skipped
    micro_batch: int | None = None  # in force: memory errors lower it
    split_checked: set[str] = field(default_factory=set)  # keys whose losses of parts were compared with their batch
    seconds: float = 0.0  # spent by earlier processes
    began: float | None = None  # clock at the start of the epoch in this process
    earlier_seconds: float = 0.0  # of the epochs before
    out_of_time: bool = False  # whether `max_minutes` is reached
    is_provisional: bool = False  # the epoch that was closed last would continue in a longer run
    best: Metrics | None = None  # metrics of the best epoch
    epochs_since_best: int = 0
    patience_reference: float | None = None  # the value that early stopping compares with
    rates: Metrics = field(default_factory=dict)  # learning rates of the last step
    grad_norm: Tensor | None = None  # of the epoch's last step, before clipping
    gradients: Metrics = field(default_factory=dict)  # of the watched parameters in that step

    @property
    def elapsed(self) -> float:
        """Seconds that the epoch has taken so far."""
        return self.seconds + (0.0 if self.began is None else time.perf_counter() - self.began)

    @property
    def training_seconds(self) -> float:
        """Seconds that the whole training has taken so far."""
        return self.earlier_seconds + self.elapsed

    @property
    def in_last_batch(self) -> bool:
        """Whether the current batch is the last of the epoch."""
        return self.batch + 1 >= self.batches

    def add_mean(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add a number that a custom step returns to its mean over the epoch."""
        if name not in self.means:
            self.means[name] = Mean(self.loss.device)
        self.means[name].update(value, weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress for a checkpoint, which does not hold the sizes of an epoch or the micro batch."""
        numerator, denominator = self.loss.sums()
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "metrics": {
                "numerator": numerator,
                "denominator": denominator,
                "means": {name: list(mean.sums()) for name, mean in self.means.items()},
                "seen": self.seen,
                "tokens": int(self.tokens),
                "skipped": self.skipped,
                "unreadable": self.unreadable,
                "seconds": self.elapsed,
                "earlier_seconds": self.earlier_seconds,
                "rates": self.rates,
                "grad_norm": self.grad_norm,
                "gradients": self.gradients,
            },
            "best": self.best,
            "early_stop": {"epochs_since_best": self.epochs_since_best, "reference": self.patience_reference},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        metrics, early = saved["metrics"], saved["early_stop"]
        self.epoch, self.batch, self.step = saved["epoch"], saved["batch"], saved["step"]
        self.loss.set_sums(metrics["numerator"], metrics["denominator"])
        self.means = {}
        for name, sums in metrics.get("means", {}).items():  # older checkpoints have none
            self.means[name] = Mean(self.loss.device)
            self.means[name].set_sums(*sums)
        self.seen, self.skipped = metrics["seen"], metrics["skipped"]
        self.tokens = metrics.get("tokens", 0)  # older checkpoints have none
        for part, samples in self.unreadable.items():  # in place, because the loaders share these mappings
            samples.clear()
            samples.update(metrics["unreadable"].get(part, {}))
        self.seconds, self.began = metrics["seconds"], None
        self.earlier_seconds = metrics.get("earlier_seconds", 0.0)  # older checkpoints have none
        self.rates, self.gradients = dict(metrics["rates"]), dict(metrics["gradients"])
        self.grad_norm = metrics["grad_norm"]
        self.best = saved["best"]
        self.epochs_since_best, self.patience_reference = early["epochs_since_best"], early["reference"]

    @staticmethod
    def check_state_dict(saved: Mapping[str, Any]) -> None:
        """Raise `ValueError` if a value has not the type that `state_dict` gives it."""
        metrics, early, best = saved["metrics"], saved["early_stop"], saved["best"]
        counts = {key: saved[key] for key in ("epoch", "batch", "step")}
        counts |= {key: metrics[key] for key in ("seen", "skipped")}
        counts |= {"tokens": metrics.get("tokens", 0), "epochs_since_best": early["epochs_since_best"]}
        for key, value in counts.items():
            if type(value) is not int or not 0 <= value < MAX_COUNT:
                raise ValueError(f"{key} is {value!r}, expected a count")
        seconds = {"seconds": metrics["seconds"], "earlier_seconds": metrics.get("earlier_seconds", 0.0)}
        valid = {key: isinstance(value, float) and 0 <= value < math.inf for key, value in seconds.items()}
        valid |= {
            "reference": isinstance(early["reference"], int | float | None),
            "best": best is None or (isinstance(best, dict) and _are_metrics(best)),
            "grad_norm": isinstance(metrics["grad_norm"], Tensor | None),
        }
        valid |= {key: isinstance(metrics[key], dict) for key in ("rates", "gradients", "unreadable")}
        valid["means"] = isinstance(metrics.get("means", {}), dict)
        for key, is_valid in valid.items():
            if not is_valid:
                raise ValueError(f"{key} has the wrong type")


def _are_metrics(best: Mapping[str, Any]) -> bool:
    return all(isinstance(key, str) for key in best) and type(best.get("epoch")) is int

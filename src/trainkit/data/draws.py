"""Random numbers that depend on (seed, epoch, sample) alone, for whole batches on any device."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

DRAWS = 16  # random numbers that a sample may use in an epoch


def uniform_draws(seed: int, epoch: int, indices: Tensor, first: int, count: int) -> Tensor:
    """Return uniform numbers in [0, 1), (count, N) float32, each made from (seed, epoch, sample, its number) alone.

    This is SplitMix64 (G. Steele, D. Lea and C. Flood, OOPSLA 2014), whose state is a counter, so any number of its
    sequence can be computed directly. 24 bits of each number are used. int64 overflows as unsigned arithmetic does.

    Args:
        seed: the seed of the run.
        epoch: the number of the epoch, from 0.
        indices: the indices of the samples, (N,) int64.
        first: the first number of each sample, below `DRAWS`.
        count: how many numbers each sample gets.
    """
    counters = indices * DRAWS + torch.arange(first, first + count, device=indices.device)[:, None]
    z = (counters + 1) * _signed(0x9E3779B97F4A7C15) + _key(seed, epoch)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).to(torch.float32) * 2.0**-24


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@functools.lru_cache
def _key(seed: int, epoch: int) -> int:
    return _signed(int(np.random.SeedSequence([seed, epoch, 0xA06]).generate_state(1, np.uint64)[0]))


def beta_quantiles(alpha: float, probability: Tensor) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at the probabilities in `probability`, from 0 to 1.

    A table and interpolation give equal results on every device, with one random number per sample.
    """
    if alpha == 1:
        return probability
    dtype = torch.float32 if probability.device.type == "mps" else torch.float64  # mps has no float64
    cdf_table, value_table, power = _beta_table(alpha)
    cdfs, values = (torch.from_numpy(table).to(probability.device, dtype) for table in (cdf_table, value_table))
    folded = torch.minimum(probability, 1 - probability).to(dtype)  # the distribution is symmetric
    right = torch.searchsorted(cdfs, folded).clamp(1, len(cdfs) - 1)
    left = right - 1
    fraction = (folded - cdfs[left]) / (cdfs[right] - cdfs[left])
    quantile = torch.lerp(values[left], values[right], fraction.clamp(0, 1)) ** power
    return torch.where(probability <= 0.5, quantile, 1 - quantile).to(probability.dtype)


@functools.lru_cache
def _beta_table(alpha: float, points: int = 4097) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Return a table of the lower half of the CDF: its values, the points, and the power to raise the points to.

    If alpha is below 1, the density has a pole at 0 but is smooth in x ** alpha. If alpha is large, the whole mass
    is within a few standard deviations of 0.5.
    """
    if alpha < 1:
        values = np.linspace(0, 0.5**alpha, points)
        density = (1 - values ** (1 / alpha)) ** (alpha - 1)
    else:
        values = np.linspace(max(0.0, 0.5 - 6 / math.sqrt(2 * alpha + 1)), 0.5, points)
        with np.errstate(divide="ignore"):
            density = np.exp((alpha - 1) * (np.log(values) + np.log1p(-values) - 2 * math.log(0.5)))
    cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(values))])
    return cdf * (0.5 / cdf[-1]), values, 1 / alpha if alpha < 1 else 1.0

"""Training images changed at random, in batches on the device.

Each sample draws from (seed, epoch, sample) alone, on every device the same numbers: neither the batch that
it is in, nor the loader, nor a resumed run changes what it looks like.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.core.errors import ConfigError, DataError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
STREAMS = 16  # numbers that a sample may draw in an epoch
MOVE, CUT, MIX = 0, 3, 5  # the first of those for flip and shifts, for the square, for mixing


@dataclass(frozen=True)
class Augment:
    """What is done to the images of a batch, in this order.

    Args:
        seed: of the run.
        flip: left to right: "random", or "alternating": half of the images in even epochs, the others in
            odd ones (K. Jordan, "94% on CIFAR-10 in 3.29 Seconds", https://arxiv.org/abs/2404.00498).
        crop_padding: shift by up to so many pixels along both axes: a crop of the padded image.
        crop_fill: what comes in at the borders: "zeros", "edge" or "reflect".
        cutout: side of a square around a random pixel that is set to 0, after normalising
            (T. DeVries and G. Taylor, https://arxiv.org/abs/1708.04552).
        mixup: alpha of the beta distribution of a sample's share in its mixture with the one before it in
            the batch; targets are mixed likewise (H. Zhang et al., https://arxiv.org/abs/1710.09412).
        cutmix: alpha of the share of a sample's area that stays its own; a rectangle is the other's
            (S. Yun et al., https://arxiv.org/abs/1905.04899). With both, half of the samples have either.
        classes: how many there are, for mixed targets.
    """

    seed: int
    flip: str | None = None
    crop_padding: int | None = None
    crop_fill: str = "zeros"
    cutout: int | None = None
    mixup: float | None = None
    cutmix: float | None = None
    classes: int | None = None

    def check(self, targets: Any) -> None:
        """Raise `DataError` where images are moved and the targets may be places in them, as masks and boxes are."""
        moving = [name for name in ("flip", "crop_padding", "cutmix") if getattr(self, name)]
        if moving and not (isinstance(targets, Tensor) and targets.dim() <= 2):
            kind = str(tuple(targets.shape)) if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"data.augment.{moving[0]}: it moves images alone, and these targets ({kind}) may be places in them",
                hint=f"write data.augment.{moving[0]}=off, and move both in the data set",
            )

    def moved(self, images: Tensor, epoch: int, indices: Tensor) -> Tensor:
        """Flipped and shifted images.

        Args:
            images: (N, C, H, W), of any type.
            epoch: from 0.
            indices: (N,) int64, which samples they are.

        Raises:
            DataError: the inputs are no images.
        """
        if images.dim() != 4:
            shape = tuple(images.shape)
            raise DataError(
                f"data.augment: inputs {shape} are no images (N, C, H, W)", hint="leave it out: data.augment=off"
            )
        if not (self.flip or self.crop_padding):
            return images
        height, width = images.shape[2:]
        if self.crop_padding and self.crop_padding >= min(height, width):
            raise ConfigError(
                f"data.augment.crop_padding={self.crop_padding}: the images are {height} x {width}",
                hint=f"write data.augment.crop_padding={min(height, width) // 8 or 'off'}",
            )
        indices = indices.to(images.device, non_blocking=True)
        drawn = draw(self.seed, epoch, indices, MOVE, 3)
        rows = torch.arange(height, device=images.device).expand(len(images), -1)
        columns = torch.arange(width, device=images.device).expand(len(images), -1)
        if self.crop_padding:
            shifts = (drawn[1:] * (2 * self.crop_padding + 1)).long() - self.crop_padding
            rows, columns = rows + shifts[0, :, None], columns + shifts[1, :, None]
        if self.flip:
            flipped = drawn[0] < 0.5
            if self.flip == "alternating":
                flipped = (draw(self.seed, 0, indices, MOVE, 1)[0] < 0.5) ^ bool(epoch % 2)
            columns = torch.where(flipped[:, None], width - 1 - columns, columns)
        pixels = images.permute(0, 2, 3, 1)
        if self.crop_padding and self.crop_fill == "zeros":
            pixels = torch.nn.functional.pad(pixels, (0, 0, 1, 1, 1, 1))
        rows, columns = (self._inside(places, size) for places, size in ((rows, height), (columns, width)))
        samples = torch.arange(len(images), device=images.device)[:, None, None]
        return pixels[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _inside(self, places: Tensor, size: int) -> Tensor:
        """Where along an axis of `size` pixels a place beyond it is read from."""
        if not self.crop_padding:
            return places
        if self.crop_fill == "zeros":
            return places.clamp(-1, size) + 1  # one row of zeros around
        if self.crop_fill == "edge":
            return places.clamp(0, size - 1)
        return (size - 1) - (size - 1 - places.abs()).abs()

    def mixed(self, images: Tensor, targets: Any, epoch: int, indices: Tensor) -> tuple[Tensor, Any]:
        """Normalised images with squares cut out, mixed with each other; the targets that belong to them.

        Mixed targets are floats: (N, classes) for classes.
        """
        indices = indices.to(images.device, non_blocking=True)
        height, width = images.shape[2:]
        if self.cutout:
            if self.cutout >= min(height, width):
                cause = f"data.augment.cutout={self.cutout}: the images are {height} x {width}"
                raise ConfigError(cause, hint=f"write data.augment.cutout={min(height, width) // 4 or 'off'}")
            middle = draw(self.seed, epoch, indices, CUT, 2)
            tops, lefts = (
                (at * size).long() - self.cutout // 2 for at, size in zip(middle, (height, width), strict=True)
            )
            square = inside(tops, tops + self.cutout, lefts, lefts + self.cutout, height, width)
            images = images.masked_fill(square[:, None], 0)
        if not (self.mixup or self.cutmix):
            return images, targets
        if not images.is_floating_point():
            raise DataError(
                f"data.augment: images of {images.dtype} cannot be mixed",
                hint="write data.normalize={mean: 0, std: 1}, or data.augment.mixup=off data.augment.cutmix=off",
            )
        which, position, *centre = draw(self.seed, epoch, indices, MIX, 4)
        cuts = which < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))
        others, share = images.roll(1, dims=0), torch.zeros_like(position)
        if self.mixup:
            share = beta_quantiles(self.mixup, position)
            mixture = torch.lerp(others, images, share.to(images.dtype).view(-1, 1, 1, 1))
            images = torch.where(cuts.view(-1, 1, 1, 1), images, mixture)
        if self.cutmix:
            side = (1 - beta_quantiles(self.cutmix, position)).sqrt()
            edges: list[Tensor] = []
            for at, size in zip(centre, (height, width), strict=True):
                first = (at * size).long() - (side * size / 2).round().long()
                edges += [first.clamp(0, size), (first + (side * size).round().long()).clamp(0, size)]
            top, bottom, left, right = edges
            box = inside(top, bottom, left, right, height, width) & cuts[:, None, None]
            images = torch.where(box[:, None], others, images)
            share = torch.where(cuts, 1 - ((bottom - top) * (right - left)).to(share.dtype) / (height * width), share)
        return images, self._mixed_targets(targets, share)

    def _mixed_targets(self, targets: Any, share: Tensor) -> Tensor:
        classes = isinstance(targets, Tensor) and targets.dtype in INTEGERS and targets.dim() == 1
        if classes and self.classes:
            if targets.device.type == "cpu" and not bool(((targets >= 0) & (targets < self.classes)).all()):
                raise DataError(
                    f"data.augment: classes from {int(targets.min())} to {int(targets.max())} cannot be mixed",
                    hint=f"give classes from 0 to {self.classes - 1} (data.classes={self.classes}), or mix none",
                )
            rows = torch.zeros((len(targets), self.classes), dtype=torch.get_default_dtype(), device=targets.device)
            targets = rows.scatter_(1, targets.long()[:, None], 1.0)
        if not isinstance(targets, Tensor) or not targets.is_floating_point():
            kind = f"{tuple(targets.shape)} {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"data.augment: targets {kind} cannot be mixed",
                hint="write data.augment.mixup=off data.augment.cutmix=off, or give classes or floats",
            )
        return torch.lerp(
            targets.roll(1, dims=0), targets, share.to(targets.dtype).view(-1, *[1] * (targets.dim() - 1))
        )


def inside(tops: Tensor, bottoms: Tensor, lefts: Tensor, rights: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in each sample's rectangle, (N, H, W) bool; the bounds are (N,), the last ones excluded."""
    rows, columns = torch.arange(height, device=tops.device), torch.arange(width, device=tops.device)
    down = (rows >= tops[:, None]) & (rows < bottoms[:, None])
    across = (columns >= lefts[:, None]) & (columns < rights[:, None])
    return down[:, :, None] & across[:, None, :]


# --------------------------------------------------------------------------------------------- draws


def draw(seed: int, epoch: int, indices: Tensor, first: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), (count, N) float32, each made from (seed, epoch, sample, its number) alone.

    SplitMix64 (G. Steele, D. Lea and C. Flood, OOPSLA 2014), whose state is a counter, so that any number
    of it can be had at once; 24 bits of each are used. int64 wraps as the unsigned arithmetic of the paper.
    """
    places = indices * STREAMS + torch.arange(first, first + count, device=indices.device)[:, None]
    z = (places + 1) * _signed(0x9E3779B97F4A7C15) + _key(seed, epoch)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 40).to(torch.float32) * 2.0**-24


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted to the right as if unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@functools.lru_cache
def _key(seed: int, epoch: int) -> int:
    return _signed(int(np.random.SeedSequence([seed, epoch, 0xA06]).generate_state(1, np.uint64)[0]))


def beta_quantiles(alpha: float, position: Tensor) -> Tensor:
    """The values of the beta distribution with both parameters `alpha` at `position` of its mass, from 0 to 1."""
    if alpha == 1:
        return position
    dtype = torch.float32 if position.device.type == "mps" else torch.float64
    mass, value, power = _beta_table(alpha)
    masses, values = (torch.from_numpy(part).to(position.device, dtype) for part in (mass, value))
    half = torch.minimum(position, 1 - position).to(dtype)  # it is symmetric
    right = torch.searchsorted(masses, half).clamp(1, len(masses) - 1)
    left = right - 1
    between = (half - masses[left]) / (masses[right] - masses[left])
    quantile = torch.lerp(values[left], values[right], between.clamp(0, 1)) ** power
    return torch.where(position <= 0.5, quantile, 1 - quantile).to(position.dtype)


@functools.lru_cache
def _beta_table(alpha: float, points: int = 4097) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """The lower half of the distribution: its mass up to some places, and the places to the power of 1 over the last.

    Below 1 the density has a pole at 0, and is smooth in x ** alpha; large ones are all within a few deviations.
    """
    if alpha < 1:
        places = np.linspace(0, 0.5**alpha, points)
        density = (1 - places ** (1 / alpha)) ** (alpha - 1)
    else:
        places = np.linspace(max(0.0, 0.5 - 6 / math.sqrt(2 * alpha + 1)), 0.5, points)
        with np.errstate(divide="ignore"):
            density = np.exp((alpha - 1) * (np.log(places) + np.log1p(-places) - 2 * math.log(0.5)))
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(places))])
    return mass * (0.5 / mass[-1]), places, 1 / alpha if alpha < 1 else 1.0

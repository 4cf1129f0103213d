"""Random changes to training images, in batches on the device.

The random numbers of a sample depend on (seed, epoch, sample) alone, and are equal on every device. So a sample looks
the same in any batch, from any loader, and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.core.errors import ConfigError, DataError
from trainkit.data.draws import beta_quantiles, uniform_draws

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# The first random number of a sample that each change uses: 3 for flip and shifts, 2 for cutout, 4 for mixing.
SHIFT_DRAWS, CUTOUT_DRAWS, MIX_DRAWS = 0, 3, 5


@dataclass(frozen=True)
class Augment:
    """The changes to the images of a batch, applied in this order.

    Args:
        seed: the seed of the run.
        flip: left to right: "random", or "alternating": half of the images in even epochs, the other half in odd
            epochs (K. Jordan, "94% on CIFAR-10 in 3.29 Seconds", https://arxiv.org/abs/2404.00498).
        crop_padding: the maximum shift along each axis, in pixels: a random crop of the padded image.
        crop_fill: the pixels at the border of a shifted image: "zeros", "edge" or "reflect".
        cutout: the side of a square around a random pixel that is set to 0, in pixels, after normalising
            (T. DeVries and G. Taylor, https://arxiv.org/abs/1708.04552).
        mixup: alpha of the beta distribution of a sample's share. The rest comes from the sample before it in the
            batch. Targets are mixed by the same share (H. Zhang et al., https://arxiv.org/abs/1710.09412).
        cutmix: alpha of the beta distribution of the area that a sample keeps. A rectangle comes from the sample
            before it (S. Yun et al., https://arxiv.org/abs/1905.04899). With both, each sample gets one of the two.
        classes: the number of classes, for mixed targets.
    """

    seed: int
    flip: str | None = None
    crop_padding: int | None = None
    crop_fill: str = "zeros"
    cutout: int | None = None
    mixup: float | None = None
    cutmix: float | None = None
    classes: int | None = None

    def check(self, inputs: Tensor, targets: Any) -> None:
        """Check that the targets stay correct if the images are changed.

        Targets that are the inputs are moved with them.

        Raises:
            DataError: images are moved and targets may be positions in them, such as masks or boxes; or images are
                mixed and the targets are the inputs.
        """
        if targets is inputs:
            for name in ("mixup", "cutmix"):
                if getattr(self, name):
                    raise DataError(
                        f"data.augment.{name}: it mixes class targets, and these targets are the inputs",
                        hint=f"write data.augment.{name}=off",
                    )
            return
        moving = [name for name in ("flip", "crop_padding", "cutmix") if getattr(self, name)]
        if moving and not (isinstance(targets, Tensor) and targets.dim() <= 2):
            kind = str(tuple(targets.shape)) if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"data.augment.{moving[0]}: it moves only images, and these targets ({kind}) may be positions in them",
                hint=f"write data.augment.{moving[0]}=off, and move both in the data set",
            )

    def flip_and_shift(self, images: Tensor, epoch: int, indices: Tensor) -> Tensor:
        """Return flipped and shifted images.

        Args:
            images: (N, C, H, W), of any dtype.
            epoch: the number of the epoch, from 0.
            indices: the indices of the samples, (N,) int64.

        Raises:
            ConfigError: the shift is larger than the images.
            DataError: the inputs are not images.
        """
        if images.dim() != 4:
            cause = f"data.augment: inputs {tuple(images.shape)} are not images (N, C, H, W)"
            raise DataError(cause, hint="write data.augment=off")
        if not (self.flip or self.crop_padding):
            return images
        height, width = images.shape[2:]
        padding = self.crop_padding or 0
        if padding >= min(height, width):
            raise ConfigError(
                f"data.augment.crop_padding={padding}: the images are {height} x {width}",
                hint=f"write data.augment.crop_padding={min(height, width) // 8 or 'off'}",
            )
        indices = indices.to(images.device, non_blocking=True)
        draws = uniform_draws(self.seed, epoch, indices, SHIFT_DRAWS, 3)
        rows = torch.arange(height, device=images.device).expand(len(images), -1)
        columns = torch.arange(width, device=images.device).expand(len(images), -1)
        if padding:
            shifts = (draws[1:] * (2 * padding + 1)).long() - padding
            rows, columns = rows + shifts[0, :, None], columns + shifts[1, :, None]
        if self.flip:
            flipped = draws[0] < 0.5
            if self.flip == "alternating":
                first = uniform_draws(self.seed, 0, indices, SHIFT_DRAWS, 1)[0]
                flipped = (first < 0.5) ^ bool(epoch % 2)
            columns = torch.where(flipped[:, None], width - 1 - columns, columns)
        pixels = images.permute(0, 2, 3, 1)
        if padding and self.crop_fill == "zeros":
            pixels = torch.nn.functional.pad(pixels, (0, 0, 1, 1, 1, 1))
        rows, columns = self._source(rows, height), self._source(columns, width)
        samples = torch.arange(len(images), device=images.device)[:, None, None]
        return pixels[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _source(self, positions: Tensor, size: int) -> Tensor:
        """Return the pixel that a position is read from; positions may be outside of an axis of `size` pixels."""
        if not self.crop_padding:
            return positions
        if self.crop_fill == "zeros":
            return positions.clamp(-1, size) + 1  # the image is padded by one row of zeros
        if self.crop_fill == "edge":
            return positions.clamp(0, size - 1)
        return (size - 1) - (size - 1 - positions.abs()).abs()

    def cutout_and_mix(self, images: Tensor, targets: Any, epoch: int, indices: Tensor) -> tuple[Tensor, Any]:
        """Return normalised images with cutout, mixup and cutmix, and their targets.

        Mixed targets are floats: (N, classes) for classes.
        """
        indices = indices.to(images.device, non_blocking=True)
        if self.cutout:
            images = self._cut_out(images, epoch, indices, self.cutout)
        if self.mixup or self.cutmix:
            return self._mix(images, targets, epoch, indices)
        return images, targets

    def _cut_out(self, images: Tensor, epoch: int, indices: Tensor, side: int) -> Tensor:
        height, width = images.shape[2:]
        if side >= min(height, width):
            cause = f"data.augment.cutout={side}: the images are {height} x {width}"
            raise ConfigError(cause, hint=f"write data.augment.cutout={min(height, width) // 4 or 'off'}")
        row, column = uniform_draws(self.seed, epoch, indices, CUTOUT_DRAWS, 2)
        top, left = (row * height).long() - side // 2, (column * width).long() - side // 2
        square = rectangle_mask(top, top + side, left, left + side, height, width)
        return images.masked_fill(square[:, None], 0)

    def _mix(self, images: Tensor, targets: Any, epoch: int, indices: Tensor) -> tuple[Tensor, Any]:
        """Mix each sample with the sample before it in the batch."""
        if not images.is_floating_point():
            raise DataError(
                f"data.augment: images of {images.dtype} cannot be mixed",
                hint="write data.normalize={mean: 0, std: 1}, or data.augment.mixup=off data.augment.cutmix=off",
            )
        which, position, *center = uniform_draws(self.seed, epoch, indices, MIX_DRAWS, 4)
        uses_cutmix = which < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))
        others, share = images.roll(1, dims=0), torch.zeros_like(position)
        if self.mixup:
            share = beta_quantiles(self.mixup, position)
            mixture = torch.lerp(others, images, share.to(images.dtype).view(-1, 1, 1, 1))
            images = torch.where(uses_cutmix.view(-1, 1, 1, 1), images, mixture)
        if self.cutmix:
            height, width = images.shape[2:]
            side = (1 - beta_quantiles(self.cutmix, position)).sqrt()  # of the rectangle, as a share of the image
            edges: list[Tensor] = []
            for middle, size in zip(center, (height, width), strict=True):
                first = (middle * size).long() - (side * size / 2).round().long()
                edges += [first.clamp(0, size), (first + (side * size).round().long()).clamp(0, size)]
            top, bottom, left, right = edges
            box = rectangle_mask(top, bottom, left, right, height, width) & uses_cutmix[:, None, None]
            images = torch.where(box[:, None], others, images)
            area = ((bottom - top) * (right - left)).to(share.dtype) / (height * width)
            share = torch.where(uses_cutmix, 1 - area, share)
        return images, self._mix_targets(targets, share)

    def _mix_targets(self, targets: Any, share: Tensor) -> Tensor:
        """Mix targets by each sample's share; classes become probabilities (N, classes)."""
        are_classes = isinstance(targets, Tensor) and targets.dtype in INTEGERS and targets.dim() == 1
        if are_classes and self.classes:
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
        column = share.to(targets.dtype).view(-1, *[1] * (targets.dim() - 1))
        return torch.lerp(targets.roll(1, dims=0), targets, column)


def rectangle_mask(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels are inside each sample's rectangle, (N, H, W) bool.

    The bounds are (N,) int64; `bottom` and `right` are excluded.
    """
    rows, columns = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None, :]

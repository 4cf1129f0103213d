"""Prepares a batch for the model: moves it to the device, converts to floats, normalises, augments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainkit.core.errors import DataError
from trainkit.core.pytree import map_batches, map_tensors
from trainkit.data.augment import Augment
from trainkit.data.pairs import map_pair

CPU = torch.device("cpu")
Batch = tuple[Any, Any]
NO_SAMPLES: Batch = (
    torch.empty(0),
    torch.empty(0),
)  # the share of a process in a batch with fewer samples than processes


@dataclass
class Prepare:
    """Moves a batch to the device, converts uint8 to floats from 0 to 1, normalises, and augments training images.

    Args:
        device: receives the batch.
        mean: is subtracted from the inputs: a number, or one number per channel (dimension 1).
        std: then divides the inputs, in the same form.
        augment: changes training images.
        memory_format: the memory format of inputs (N, C, H, W).
        drop_first: leave out the first sample after the augmentation, which mixed it with the second.
    """

    device: torch.device
    mean: Tensor | None = None
    std: Tensor | None = None
    augment: Augment | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    drop_first: bool = False
    _affines: dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __call__(
        self, inputs: Any, targets: Any, epoch: int = 0, indices: Tensor | Sequence[int] | None = None
    ) -> Batch:
        """Return the batch as the model receives it.

        Args:
            inputs: the inputs of the samples.
            targets: the targets of the samples. If they are `inputs`, they are prepared as the inputs are.
            epoch: the number of the epoch, from 0.
            indices: the indices of the samples, N integers. None: the samples are not augmented.
        """
        inputs, targets = map_pair((inputs, targets), self._move)
        same = targets is inputs
        if self.augment is None or indices is None:
            inputs = map_batches(inputs, self._to_floats)
        else:
            inputs, targets = self._augment(self.augment, inputs, targets, epoch, torch.as_tensor(indices))
        # A copy, as the model may change its inputs in place.
        return inputs, map_tensors(inputs, torch.clone) if same else targets

    def _augment(self, augment: Augment, inputs: Any, targets: Any, epoch: int, indices: Tensor) -> Batch:
        if not isinstance(inputs, Tensor):
            cause = f"data.augment: the inputs are {type(inputs).__name__}, not images"
            raise DataError(cause, hint="write data.augment=off")
        augment.check(inputs, targets)
        images = self._to_floats(augment.flip_and_shift(inputs, epoch, indices))
        images, targets = augment.cutout_and_mix(images, targets, epoch, indices)
        return (images[1:], targets[1:]) if self.drop_first else (images, targets)

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.is_cpu and self.device == CPU:  # `to` would return the tensor too, after a while
            return tensor
        if self.device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()  # without pinned memory, the copy blocks this process
        return tensor.to(self.device, non_blocking=True)

    def _to_floats(self, tensor: Tensor) -> Tensor:
        layout = self.memory_format if tensor.dim() == 4 else torch.preserve_format
        is_image = tensor.dtype == torch.uint8
        normalized = self.mean is not None and self.std is not None
        is_float = tensor.is_floating_point() or tensor.is_complex()
        dtype = torch.get_default_dtype() if is_image or (normalized and not is_float) else tensor.dtype
        if dtype != tensor.dtype or layout is not torch.preserve_format:
            tensor = tensor.to(dtype, memory_format=layout)
        if not normalized:
            return tensor.div_(255) if is_image else tensor
        shift, scale = self._affine(tensor, is_image)
        return torch.addcmul(shift, tensor, scale)

    def _affine(self, tensor: Tensor, is_image: bool) -> tuple[Tensor, Tensor]:
        """Return shift and scale, so that (x / 255 - mean) / std is shift + x * scale; cached by dtype."""
        key = tensor.dtype, is_image
        if key not in self._affines:
            mean, std = (stat.to("cpu", torch.float64) for stat in (self.mean, self.std) if stat is not None)
            shift, scale = -mean / std, 1 / (std * 255 if is_image else std)
            self._affines[key] = shift.to(tensor.dtype).to(self.device), scale.to(tensor.dtype).to(self.device)
        shape = (-1, *[1] * (tensor.dim() - 2))
        shift, scale = self._affines[key]
        return shift.view(shape), scale.view(shape)

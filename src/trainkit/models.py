"""The tutorial models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ToyCNN(nn.Sequential):
    """The tutorial CNN for 32x32 images, without activations.

    Three 5x5 convolutions to 32, 32 and 64 channels, each followed by 2x2 max pooling, then linear
    layers of 1024 to 64 to `num_classes`.

    Shape: (N, in_channels, 32, 32) to (N, num_classes).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, kernel_size=5, padding=2)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(32, 32, kernel_size=5, padding=2)
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.pool3 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(1024, 64)
        self.fc2 = nn.Linear(64, num_classes)


class MLP(nn.Sequential):
    """Flatten, then linear layers with ReLU between them. The input size is taken from the first batch.

    Shape: (N, ...) to (N, out_features).
    """

    def __init__(self, hidden: Sequence[int] = (256,), out_features: int = 10, bias: bool = True) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        for number, size in enumerate(hidden, start=1):
            self.add_module(f"fc{number}", nn.LazyLinear(size, bias=bias))
            self.add_module(f"relu{number}", nn.ReLU())
        self.head = nn.LazyLinear(out_features, bias=bias)


class Linear(nn.Linear):
    """`nn.Linear` whose weights, and bias if any, may start at a given value.

    Shape: (N, in_features) to (N, out_features).
    """

    def __init__(
        self, in_features: int = 1, out_features: int = 1, bias: bool = True, init: float | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if init is not None:
            nn.init.constant_(self.weight, init)
            if self.bias is not None:
                nn.init.constant_(self.bias, init)


class Polynomial(nn.Module):
    """x + y² + z³ of its three scalar parameters, whatever the input is.

    Shape: anything to ().
    """

    def __init__(self, x: float = 1.0, y: float = 2.0, z: float = 3.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x))
        self.y = nn.Parameter(torch.tensor(y))
        self.z = nn.Parameter(torch.tensor(z))

    def forward(self, inputs: object) -> Tensor:  # noqa: ARG002
        """The polynomial's value."""
        return self.x + self.y**2 + self.z**3


class RowCNN(nn.Module):
    """Images to sequences: a convolution, then each row of its map becomes one vector.

    Shape: (N, in_channels, H, W) to (N, H // 4, features).
    """

    def __init__(self, in_channels: int = 3, features: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, kernel_size=5, padding=2)
        self.project = nn.LazyLinear(features)

    def forward(self, images: Tensor) -> Tensor:
        """The rows of the images, top to bottom."""
        maps = nn.functional.max_pool2d(self.conv(images).relu(), 4)
        rows: Tensor = self.project(maps.transpose(1, 2).flatten(2))
        return rows


class GRUClassifier(nn.Module):
    """A GRU over a sequence, and a linear layer on its last state.

    Shape: (N, L, in_features) to (N, num_classes).
    """

    def __init__(self, in_features: int = 32, hidden: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.gru = nn.GRU(in_features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, sequence: Tensor) -> Tensor:
        """The logits of each sequence."""
        _, last = self.gru(sequence)
        logits: Tensor = self.head(last[-1])
        return logits

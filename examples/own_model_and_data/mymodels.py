"""A custom model: any `torch.nn.Module` will do."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Add the output of a small network to its input.

    Shape: (N, width) to (N, width).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs plus the change that the block computes."""
        change: Tensor = self.reduce(self.expand(self.norm(inputs)).relu())
        return inputs + change


class ResidualMLP(nn.Module):
    """A stem, a stack of residual blocks, and a head.

    Shape: (N, ...) to (N, num_classes). The lazy stem takes its input size from the first batch.

    Args:
        width: number of features in each block.
        depth: number of blocks.
        num_classes: number of outputs.
    """

    def __init__(self, width: int = 32, depth: int = 2, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.LazyLinear(width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of each class."""
        logits: Tensor = self.head(self.blocks(self.stem(inputs.flatten(1))))
        return logits

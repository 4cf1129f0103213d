"""The tutorial models, and small models for other tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ToyCNN(nn.Sequential):
    """The tutorial CNN for 32x32 images, without activations.

    Three 5x5 convolutions to 32, 32 and 64 channels, each followed by 2x2 max pooling. Then two linear layers, from
    1024 to 64 features and from 64 to `num_classes`.

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
    """x + y² + z³ of its three scalar parameters. The input is ignored.

    Shape: anything to ().
    """

    def __init__(self, x: float = 1.0, y: float = 2.0, z: float = 3.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x))
        self.y = nn.Parameter(torch.tensor(y))
        self.z = nn.Parameter(torch.tensor(z))

    def forward(self, inputs: object) -> Tensor:  # noqa: ARG002
        """Return the value of the polynomial."""
        return self.x + self.y**2 + self.z**3


class RowCNN(nn.Module):
    """Images to sequences: a convolution, whose output becomes one vector per row.

    Shape: (N, in_channels, H, W) to (N, H // 4, features).
    """

    def __init__(self, in_channels: int = 3, features: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, kernel_size=5, padding=2)
        self.project = nn.LazyLinear(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the rows of the images, from top to bottom."""
        maps = nn.functional.max_pool2d(self.conv(images).relu(), 4)
        rows: Tensor = self.project(maps.transpose(1, 2).flatten(2))
        return rows


class LSTMLanguageModel(nn.Module):
    """Predict the next token at each position of a text. The hidden state is carried from batch to batch.

    Gradients stop at the start of a batch. If the batch size changes, the state starts again at zero.

    Shape: tokens (N, L) int64 to logits (N, num_classes, L).

    Args:
        num_classes: the size of the vocabulary.
        embedding: the size of a token's embedding.
        hidden: the size of the hidden state.
        layers: the number of layers of the LSTM.
        dropout: the dropout rate of the embeddings, between the layers, and of the outputs.
        tied: whether the output layer and the embedding share their weights, which needs `embedding` = `hidden`.
    """

    hidden_state: Tensor | None
    cell_state: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, num_classes)
        if tied:
            if embedding != hidden:
                raise ValueError(f"tied weights need embedding = hidden, found {embedding} and {hidden}")
            self.head.weight = self.embedding.weight
        self.register_buffer("hidden_state", None)
        self.register_buffer("cell_state", None)

    def reset_state(self) -> None:
        """Start the next batch at a state of zero. trainkit calls this before an epoch and before a validation."""
        self.hidden_state = self.cell_state = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each token."""
        state = None
        if self.hidden_state is not None and self.cell_state is not None and self.hidden_state.shape[1] == len(tokens):
            state = self.hidden_state, self.cell_state
        outputs, (hidden, cell) = self.lstm(self.dropout(self.embedding(tokens)), state)
        self.hidden_state, self.cell_state = hidden.detach(), cell.detach()
        logits: Tensor = self.head(self.dropout(outputs))
        return logits.transpose(1, 2)


class GRUClassifier(nn.Module):
    """A GRU over a sequence, and a linear layer on its last state.

    Shape: (N, L, in_features) to (N, num_classes).
    """

    def __init__(self, in_features: int = 32, hidden: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.gru = nn.GRU(in_features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the logits of each sequence."""
        _, last = self.gru(sequence)
        logits: Tensor = self.head(last[-1])
        return logits


class GPT(nn.Module):
    """A small decoder-only transformer with pre-norm blocks, as in GPT-2.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. The token embedding is also the
    output layer. The linear layers that add to the residual stream start with smaller weights, by 1/sqrt(2 * depth).

    Args:
        num_classes: the size of the vocabulary.
        context: the maximum number of tokens in a sequence.
        depth: the number of blocks.
        heads: attention heads per block; `width` is a multiple of it.
        width: the size of a token's vector.
        dropout: the probability that a value of the residual stream, or an attention weight, is set to 0.

    Shape: tokens (N, T) int64, T at most `context`, to logits (N, num_classes, T), as `nn.CrossEntropyLoss` takes them.
    """

    def __init__(
        self,
        num_classes: int,
        context: int = 128,
        depth: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.context = context
        self.tokens = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_stream = name.endswith(("project.weight", "shrink.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if adds_to_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each token."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"the sequences have {length} tokens, and context={self.context}")
        stream = self.tokens(tokens) + self.positions.weight[:length]
        stream = self.dropout(stream)
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = nn.functional.linear(self.norm(stream), self.tokens.weight)
        return logits.transpose(1, 2)


class GPTBlock(nn.Module):
    """Causal self-attention and a two-layer MLP. Each has a layer norm before it, and is added to its input.

    Shape: (N, T, width) to (N, T, width).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1 = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the residual stream with the attention and the MLP added."""
        samples, length, width = stream.shape
        query, key, value = self.attend(self.norm1(stream)).view(samples, length, 3, self.heads, -1).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=self.rate if self.training else 0.0,
            is_causal=True,
        )
        stream = stream + self.dropout(self.project(mixed.transpose(1, 2).reshape(samples, length, width)))
        result: Tensor = stream + self.dropout(self.shrink(nn.functional.gelu(self.grow(self.norm2(stream)))))
        return result


class UNet(nn.Module):
    """A small U-Net: a class for each pixel.

    Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015, with
    padded convolutions and batch norm. Each level halves the image and doubles the channels.

    Shape: (N, in_channels, H, W) to (N, num_classes, H, W); H and W are multiples of 2**depth.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 2, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            double_convolution(before, after) for before, after in zip([in_channels, *sizes], sizes, strict=False)
        )
        self.up = nn.ModuleList(double_convolution(3 * size, size) for size in reversed(sizes[:-1]))
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each pixel."""
        maps, skipped = self.down[0](images), []
        for block in self.down[1:]:
            skipped.append(maps)
            maps = block(nn.functional.max_pool2d(maps, 2))
        for block in self.up:
            maps = nn.functional.interpolate(maps, scale_factor=2)
            maps = block(torch.cat([skipped.pop(), maps], dim=1))
        logits: Tensor = self.head(maps)
        return logits


def double_convolution(before: int, after: int) -> nn.Sequential:
    """Return two 3x3 convolutions, each with batch norm and ReLU. Shape: (N, before, H, W) to (N, after, H, W)."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class Pick(nn.Module):
    """Returns one entry of the outputs of another model, such as `out` of a segmentation model of torchvision.

    Args:
        entry: a key of a mapping, a position in a tuple, or the name of an attribute.
    """

    def __init__(self, entry: str | int) -> None:
        super().__init__()
        self.entry = entry

    def forward(self, outputs: Any) -> Any:
        """Return the entry."""
        if isinstance(outputs, Mapping | tuple | list):
            entries: Any = outputs
            return entries[self.entry]
        return getattr(outputs, str(self.entry))

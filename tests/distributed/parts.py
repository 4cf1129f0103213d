"""Data, models, losses, metrics and steps of the exactness tests. All use torch's default dtype."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

FEATURES, CLASSES = 6, 5
IGNORED = -100


def rows(size: int, kind: str = "classes", seed: int = 0, **_: Any) -> TensorDataset:
    """Return random inputs with targets.

    Args:
        size: the number of samples.
        kind: of the targets: `classes`, `ignored` (most of them are), `numbers` or `noisy`; or `images`, `tokens`.
        seed: the seed.
        _: arguments of the data set that this one replaces.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1)[:, None] / size
    inputs = torch.randn(size, FEATURES, generator=generator).to(torch.get_default_dtype()) * (0.5 + scale)
    classes = (inputs[:, :CLASSES] + 0.5 * torch.randn(size, CLASSES, generator=generator)).argmax(1)
    if kind == "images":
        inputs = torch.randn(size, 3, 8, 8, generator=generator).to(torch.get_default_dtype())
    if kind == "tokens":
        return TensorDataset(torch.randint(0, 40, (size, 7), generator=generator), classes)
    if kind == "numbers":
        return TensorDataset(inputs, inputs[:, :2] * 2 - 1)
    if kind == "ignored":
        classes = classes.where(torch.rand(size, generator=generator) < 0.1, IGNORED)
    if kind == "broken":  # one sample of training data
        inputs[7] = float("nan")
    return TensorDataset(inputs, classes)


class Net(nn.Module):
    """Two linear layers.

    Args:
        outputs: the number of outputs.
        unused: whether there is a parameter that no forward pass uses.
        normalize: whether there is a layer norm.
    """

    def __init__(self, outputs: int = CLASSES, *, unused: bool = False, normalize: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 16)
        self.norm: nn.Module = nn.LayerNorm(16) if normalize else nn.Identity()
        self.head = nn.Linear(16, outputs)
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, outputs)."""
        result: Tensor = self.head(self.norm(self.body(inputs)).tanh())
        return result


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, FEATURES)."""
        result: Tensor = inputs + self.second(self.first(inputs).tanh())
        return result


class Blocks(nn.Module):
    """Equal blocks, for activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, CLASSES)."""
        result: Tensor = self.head(self.blocks(inputs))
        return result


class Convolutions(nn.Module):
    """Two convolutions and a linear layer, for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 8, 8) -> (N, CLASSES)."""
        result: Tensor = self.layers(images)
        return result


class Experts(nn.Module):
    """Each sample uses one expert, so a share may use few of them, and expert 4 is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(5)])

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, CLASSES)."""
        chosen = (inputs[:, 0] > 2.5).long() + (inputs[:, 1] > 2.5) + (inputs[:, 2] > 2)
        outputs = inputs.new_zeros(len(inputs), CLASSES)
        for number, expert in enumerate(self.experts):
            used = chosen == number
            if bool(used.any()):
                outputs = outputs.index_put((used.nonzero()[:, 0],), expert(inputs[used]))
        return outputs


class Loud(Net):
    """Its gradient overflows in fp16 at the first scales."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, CLASSES)."""
        return super().forward(inputs) * 400


class Words(nn.Module):
    """The mean of sparse embeddings of tokens."""

    def __init__(self, *, sparse: bool = True) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(40, 8, sparse=sparse)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) int64 -> (N, CLASSES)."""
        result: Tensor = self.head(self.embedding(tokens))
        return result


class Gan(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(3, 3)
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


class Counting(nn.Module):
    """Carries the sum of its inputs from batch to batch."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("total", torch.zeros(FEATURES))

    def reset_state(self) -> None:
        """Forget the sum."""
        self.total = torch.zeros_like(self.total)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, CLASSES)."""
        self.total = self.total + inputs.detach().sum(0)
        result: Tensor = self.head(inputs + self.total)
        return result


# ------------------------------------------------------------------------------------------------- losses


class Shifted(nn.Module):
    """A cross entropy with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(10))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean."""
        return functional.cross_entropy(outputs + self.shift, targets)


class Scaled(nn.Module):
    """A mean over the targets that are not ignored, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean."""
        logits = outputs * self.temperature + self.shift
        return functional.cross_entropy(logits, targets, reduction="sum") / self.denominator(targets).clamp(min=1)

    def denominator(self, targets: Tensor) -> Tensor:
        """Return the number of targets that count."""
        return (targets != IGNORED).sum()


class Contrastive(nn.Module):
    """Compares the samples of a batch, and does not say so."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over all pairs."""
        alike = (targets[:, None] == targets).to(outputs.dtype)
        return functional.mse_loss(outputs @ outputs.T, alike)


class WholeBatch(Contrastive):
    """Says that it compares samples."""

    whole_batch = True


# ------------------------------------------------------------------------------------------------ metrics


class MeanMargin:
    """The mean difference between the two largest outputs."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.total, self.count = 0.0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        top = outputs.topk(2, dim=1).values
        self.total += float((top[:, 0] - top[:, 1]).double().sum())
        self.count += len(targets)

    def compute(self) -> dict[str, float]:
        """Return the mean, and the number of samples."""
        return {"margin": self.total / self.count, "count": self.count}


# -------------------------------------------------------------------------------------------------- steps


def weighted_step(model: nn.Module, inputs: Tensor, targets: Tensor, _: nn.Module) -> dict[str, Any]:
    """Return a mean over the targets that count, and further numbers."""
    outputs = model(inputs)
    counted = targets != IGNORED
    total = functional.cross_entropy(outputs, targets, reduction="sum", ignore_index=IGNORED)
    number = counted.sum()
    return {
        "loss": total / number.clamp(min=1),
        "denominator": number,
        "outputs": outputs,
        "size": (outputs.square().mean(), len(inputs)),
        "largest": (inputs.mean(), len(inputs)),
    }


def plain_step(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: nn.Module) -> Tensor:
    """Return the loss alone."""
    result: Tensor = loss_fn(model(inputs), targets)
    return result


def sum_step(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: nn.Module) -> Tensor:
    """Return a loss that is no mean over samples, without a denominator."""
    result: Tensor = loss_fn(model(inputs), targets) * len(inputs)
    return result


def contrastive_step(model: nn.Module, inputs: Tensor, targets: Tensor, _: nn.Module) -> dict[str, Any]:
    """Return a loss that compares samples, and says that it is a mean over them."""
    return {"loss": Contrastive()(model(inputs), targets), "denominator": len(targets)}


def gan_step(model: Gan, inputs: Tensor, _: Tensor, __: nn.Module) -> Iterator[tuple[str, Any]]:
    """Update the discriminator, then the generator; the noise is a part of the inputs."""
    real, noise = inputs[:, :3], inputs[:, 3:]
    fake = model.generator(noise)
    scores = model.discriminator(real)[:, 0], model.discriminator(fake.detach())[:, 0]
    ones = torch.ones_like(scores[0])
    bce = functional.binary_cross_entropy_with_logits
    yield "discriminator", {"loss": bce(scores[0], ones) + bce(scores[1], 0 * ones), "real": scores[0].mean()}
    yield "generator", {"loss": bce(model.discriminator(fake)[:, 0], ones), "denominator": len(real)}


# --------------------------------------------------------------------------------------------------- hooks


class OutOfMemory(nn.Module):
    """A layer that runs out of memory on one rank, once it gets more than some samples.

    Args:
        rank: the rank.
        samples: the largest number of samples that fit.
        mode: `training` or `validation`.
    """

    def __init__(self, rank: int, samples: int, mode: str = "training") -> None:
        super().__init__()
        self.rank, self.samples, self.mode = rank, samples, mode
        self.net = Net()

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, CLASSES)."""
        is_here = int(os.environ.get("RANK", "-1")) == self.rank
        if is_here and self.training == (self.mode == "training") and len(inputs) > self.samples:
            raise torch.OutOfMemoryError("out of memory")
        result: Tensor = self.net(inputs)
        return result

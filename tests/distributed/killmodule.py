"""What trainings on several ranks use in tests: a hook that ends ranks at a chosen moment, a step, a model, samples."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainkit.runs import checkpoint, checkpoint_files

writing: Any = checkpoint  # the module, whose names the hook replaces


class Kill:
    """Sends its process a signal at a moment of the training.

    Args:
        moment: the name of a method below.
        count: how often the moment must come.
        rank: the only rank that gets the signal; None: each rank.
        number: the signal.
    """

    def __init__(self, moment: str, count: int, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        self.moment, self.left, self.rank, self.number = moment, count, rank, number
        self.on_val_batch: Any = None

    def on_start(self, state: Any) -> None:
        """Wait for the moment."""
        if self.rank in (None, state.objects.ranks.rank):
            getattr(self, self.moment)(state)

    def come(self, *_: Any) -> None:
        """Count the moment; send the signal if it has come often enough."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def step(self, state: Any) -> None:
        """Choose the start of a forward pass."""
        state.model.register_forward_pre_hook(self.come)

    def update(self, state: Any) -> None:
        """Choose the moment before the optimizer changes the weights."""
        state.optimizer.register_step_pre_hook(self.come)

    def validation(self, _: Any) -> None:
        """Choose the moment after a batch of the validation."""
        self.on_val_batch = self.come

    def writing(self, _: Any) -> None:
        """Choose a moment in a checkpoint: the state is written, the manifest is not."""
        write, found = writing.write_checkpoint_files, checkpoint_files.checksum

        def write_and_come(folder: Path, saved: Mapping[str, Any], *more: Any) -> None:
            def come_first(content: Mapping[str, Any]) -> str:
                self.come()
                return found(content)

            checkpoint_files.checksum = come_first
            write(folder, saved, *more)
            checkpoint_files.checksum = found

        writing.write_checkpoint_files = write_and_come

    def pointer(self, _: Any) -> None:
        """Choose the moment when a checkpoint has its name, and `last` does not name it."""
        point = checkpoint.Checkpoints.set_pointer

        def come_and_point(checkpoints: checkpoint.Checkpoints, pointer: str, name: str) -> None:
            if pointer == "last":
                self.come()
            point(checkpoints, pointer, name)

        checkpoint.Checkpoints.set_pointer = come_and_point  # type: ignore[method-assign,assignment]


class Queue:
    """A training step with a state, which differs between the ranks: the mean of the outputs so far."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)

    def __call__(self, model: Any, inputs: Tensor, targets: Tensor, loss_fn: Any) -> Tensor:
        """Return the loss."""
        outputs = model(inputs)
        loss: Tensor = loss_fn(outputs - self.mean, targets)
        self.mean = 0.9 * self.mean + 0.1 * outputs.detach().mean(0)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the mean."""
        return {"mean": self.mean}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the mean."""
        self.mean = saved["mean"]


class Points:
    """Fixed samples."""

    classes: ClassVar = ["a", "b", "c"]

    def __init__(self, size: int = 61) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(8, generator=torch.Generator().manual_seed(index)), index % 3


class Linear(nn.Linear):
    """A linear model that computes in its own dtype."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__(8, 3, dtype=getattr(torch, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return super().forward(x.to(self.weight.dtype))

"""A training step in which the model learns from the model of an earlier run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.core.errors import CheckpointError, ConfigError, named_errors
from trainkit.core.pytree import describe
from trainkit.engine.load import load
from trainkit.training.losses import denominator


class Distillation:
    """Learn the class probabilities of a teacher beside the targets: https://arxiv.org/abs/1503.02531.

    The loss is `alpha` x T^2 x KL(teacher, model) + (1 - alpha) x `loss_fn`, with the logits of both divided by T in
    the divergence. Both parts are divided by the denominator of `loss_fn`. The teacher is not trained, and its weights
    are not in the checkpoints, which hold their hash.

    Args:
        teacher: the directory of a run, whose best model is the teacher; or `last`, the newest run at the start.
        temperature: T.
        alpha: the weight of the teacher, from 0 to 1.
    """

    def __init__(self, teacher: str, temperature: float = 4.0, alpha: float = 0.9) -> None:
        if not teacher:
            cause = f"training_step.teacher={teacher!r} is not the directory of a run"
            raise ConfigError(cause, hint="write training_step.teacher=DIR, or training_step.teacher=last")
        if temperature <= 0 or not 0 <= alpha <= 1:
            cause = f"training_step: temperature={temperature:g} and alpha={alpha:g}"
            raise ConfigError(cause, hint="write a temperature above 0, and an alpha from 0 to 1")
        with named_errors(f"training_step.teacher={teacher}"):
            self.name, self.teacher = teacher, load(teacher)
        self.temperature, self.alpha = temperature, alpha

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        self.teacher.to(device)

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, loss_fn: nn.Module) -> dict[str, Any]:
        """Return the loss, its two parts and the outputs of the model."""
        outputs = model(inputs)
        with torch.no_grad():
            taught = self.teacher(inputs)
        self._check(outputs, taught)
        count = denominator(loss_fn, targets, len(outputs))
        log_probabilities = F.log_softmax(outputs / self.temperature, 1)
        taught = F.log_softmax(taught / self.temperature, 1)
        divergence = F.kl_div(log_probabilities, taught, reduction="sum", log_target=True)
        from_teacher, from_targets = self.temperature**2 * divergence / count, loss_fn(outputs, targets)
        loss = self.alpha * from_teacher + (1 - self.alpha) * from_targets
        parts = {"from_teacher": from_teacher, "from_targets": from_targets}
        return {"loss": loss, "outputs": outputs, "denominator": count, **parts}

    def _check(self, outputs: Any, taught: Any) -> None:
        """Raise `ConfigError` if the model and the teacher do not return logits of the same shape."""
        if (
            not isinstance(outputs, Tensor)
            or not isinstance(taught, Tensor)
            or outputs.shape != taught.shape
            or outputs.dim() != 2
        ):
            cause = f"training_step: the teacher {self.name} returns {describe(taught)}, the model {describe(outputs)}"
            raise ConfigError(cause, hint="distillation needs logits (samples, classes) of the same classes from both")

    def state_dict(self) -> dict[str, str]:
        """Return the hash of the teacher's weights."""
        digest = hashlib.sha256()
        for name, tensor in self.teacher.state_dict().items():
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(name.encode() + content)
        return {"teacher_sha256": digest.hexdigest()}

    def load_state_dict(self, saved: dict[str, str]) -> None:
        """Compare the teacher with that of the checkpoint.

        Raises:
            CheckpointError: the weights of the teacher have changed.
        """
        if saved != self.state_dict():
            cause = f"training_step.teacher={self.name}: its weights have changed since the checkpoint"
            raise CheckpointError(cause, hint="restore the run of the teacher, or start a new run")

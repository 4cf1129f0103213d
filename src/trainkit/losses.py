"""Losses that configs name, besides those of torch, and functions as losses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of

# The functions of torch's losses, whose modules have the same arguments.
MODULES = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.kl_div: nn.KLDivLoss,
}

REGRESSION_LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
FLOAT_TARGET_LOSSES = (*REGRESSION_LOSSES, nn.BCELoss, nn.BCEWithLogitsLoss)


class Identity(nn.Module):
    """A loss for models whose output is the loss itself: the mean of the output, whatever its shape."""

    def forward(self, outputs: Tensor, targets: object) -> Tensor:  # noqa: ARG002
        """Return the mean of `outputs`; `targets` are ignored."""
        return outputs.mean()


class NTXent(nn.Module):
    """The loss of SimCLR: each view has to find the other view of its image among all views of the batch.

    T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
    https://arxiv.org/abs/2002.05709.

    Args:
        temperature: divides the cosine similarities.

    Shape: the outputs are a pair, or a tensor with a first dimension of 2: the views, (N, D) each.
    """

    whole_batch = True  # compares the samples of a batch

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(
                f"loss.temperature={temperature:g}: must be above 0", hint="for example loss.temperature=0.5"
            )
        self.temperature = temperature

    def forward(self, outputs: Any, targets: object) -> Tensor:  # noqa: ARG002
        """Return the mean over all views."""
        first, second = outputs
        views = functional.normalize(torch.cat([first, second]), dim=1)
        similarities = (views @ views.T / self.temperature).fill_diagonal_(float("-inf"))  # a view is not its own pair
        return functional.cross_entropy(similarities, torch.arange(len(views), device=views.device).roll(len(first)))


class FromModel(nn.Module):
    """A loss for models that compute their loss from targets among their inputs, as those of Hugging Face do.

    The outputs are a mapping, or an object with attributes. The denominator is the number by which the model divides:
    for integer targets the number of those that are not `ignore_index`, else the number of samples.

    Args:
        entry: the key of the loss in the outputs.
        logits: key of the class outputs, (N, ..., C), for the accuracy.
        ignore_index: marks targets that the model ignores.
        shifted: the model predicts the next token, so the first token of a sequence is not a target. auto: if the
            class name of the model ends in ForCausalLM or LMHeadModel.
    """

    def __init__(
        self, entry: str = "loss", logits: str = "logits", ignore_index: int = -100, shifted: bool | str = "auto"
    ) -> None:
        super().__init__()
        self.entry, self.logits, self.ignore_index, self.shifted = entry, logits, ignore_index, shifted

    def bind(self, model: nn.Module) -> None:
        """Decide by the class of the model whether the targets are shifted, if this is not given."""
        if self.shifted == "auto":
            self.shifted = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def forward(self, outputs: Any, targets: object) -> Tensor:  # noqa: ARG002
        """Return the loss among the outputs.

        Raises:
            ConfigError: the outputs contain no loss.
        """
        loss = _entry(outputs, self.entry)
        if loss is None:
            names = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
            cause = f"loss: the model returns a {type(outputs).__name__}{names}, without a {self.entry!r}"
            hint = "give the model its targets: write data.inputs=off, or add the key of the targets to data.inputs"
            raise ConfigError(cause, hint=hint)
        return cast(Tensor, loss)

    def denominator(self, targets: Any) -> Tensor | int:
        """Return the number of targets that are not ignored, or the number of samples."""
        labels = self._labels(targets)
        if labels is None or labels.is_floating_point():
            return batch_size_of(targets)
        return (labels != self.ignore_index).sum()

    def class_outputs(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return outputs (N, C, ...) and targets (N, ...) of equal positions, or None if there are no classes."""
        logits, labels = _entry(outputs, self.logits), self._labels(targets)
        if not isinstance(logits, Tensor) or labels is None or labels.is_floating_point() or logits.dim() < 2:
            return None, None
        if self.shifted is True and logits.dim() > 2:
            logits = logits[:, :-1]
        return logits.movedim(-1, 1), labels

    def _labels(self, targets: Any) -> Tensor | None:
        """Return the targets as the model counts them; None if they are not one tensor."""
        labels = targets.get("labels") if isinstance(targets, Mapping) else targets
        if not isinstance(labels, Tensor):
            return None
        return labels[:, 1:] if self.shifted is True and labels.dim() > 1 else labels


def _entry(outputs: Any, key: str) -> Any:
    return outputs.get(key) if isinstance(outputs, Mapping) else getattr(outputs, key, None)


class FunctionLoss(nn.Module):
    """A function of (outputs, targets) as a loss.

    The attributes `reduction`, `whole_batch` and `denominator` of the function are those of the loss.

    Args:
        function: returns a number, a scalar tensor.
        arguments: further arguments of the function; tensors among them become buffers.
    """

    def __init__(self, function: Callable[..., Tensor], /, **arguments: Any) -> None:
        super().__init__()
        self.wrapped_function = function
        self.arguments = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        self.tensors = [name for name in arguments if name not in self.arguments]
        for name in self.tensors:
            self.register_buffer(name, arguments[name])
        self.reduction = arguments.get("reduction", getattr(function, "reduction", "mean"))
        self.whole_batch: bool | None = getattr(function, "whole_batch", None)
        self.denominator: Callable[..., Any] | None = getattr(function, "denominator", None)

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch."""
        tensors = {name: getattr(self, name) for name in self.tensors}
        return self.wrapped_function(outputs, targets, **self.arguments, **tensors)


def loss_from_function(function: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    """Return a function as a loss. The functions in `MODULES` become their modules, which have exact denominators."""
    if isinstance(function, functools.partial) and function.func in MODULES and not function.args:
        return loss_from_function(function.func, {**function.keywords, **arguments})
    module = MODULES.get(function)
    if module is None or not arguments.keys() <= inspect.signature(module).parameters.keys():
        return FunctionLoss(function, **arguments)
    loss: nn.Module = module(**arguments)
    return loss

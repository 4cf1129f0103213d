"""Hooks that configs name: sample images of a generative model, and a linear probe of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.core.atomic import atomic_write
from trainkit.core.errors import ConfigError
from trainkit.core.modes import evaluating
from trainkit.core.pytree import describe
from trainkit.core.rng import preserve_rng
from trainkit.core.spelling import did_you_mean
from trainkit.data.stream_loader import StreamLoader

if TYPE_CHECKING:
    from trainkit.training.state import State


class SampleImages:
    """Writes a grid of generated images to `samples/epoch-0001.png` in the run directory after each epoch.

    The noise is the same in each epoch. With `ema`, the averaged model generates the images.

    Args:
        count: the number of images.
        columns: the number of images in a row of the grid.
        every: the number of epochs between two grids.
        seed: the seed of the noise.

    Raises:
        ConfigError: `count`, `columns` or `every` is less than 1.
    """

    def __init__(self, count: int = 64, columns: int = 8, every: int = 1, seed: int = 0) -> None:
        if min(count, columns, every) < 1:
            raise ConfigError(
                f"hooks: SampleImages: count={count}, columns={columns} and every={every} must be at least 1",
                hint="for example count=64 columns=8 every=1",
            )
        self.count, self.columns, self.every, self.seed = count, columns, every, seed

    def on_start(self, state: State) -> None:
        """Check that the model generates images.

        Raises:
            ConfigError: it does not.
        """
        model = state.model
        if not (callable(getattr(model, "sample", None)) and isinstance(getattr(model, "latent", None), int)):
            raise ConfigError(
                f"hooks: SampleImages needs a model with a number `latent` and a method sample(noise), and "
                f"{type(model).__name__} does not have both",
                hint="add both to the model, or use another hook",
            )

    def on_epoch_end(self, state: State, metrics: dict[str, Any]) -> None:  # noqa: ARG002
        """Write the images of the epoch."""
        if state.directory is None or state.epoch % self.every:
            return
        from torchvision.transforms.v2.functional import to_pil_image
        from torchvision.utils import make_grid

        model: Any = state.evaluated[0]
        noise = torch.randn(self.count, model.latent, generator=torch.Generator().manual_seed(self.seed))
        with evaluating(model), preserve_rng():
            images = model.sample(noise.to(state.device)).float().clamp(0, 1).cpu()
        picture = to_pil_image(make_grid(images, nrow=self.columns))
        folder = state.directory / "samples"
        folder.mkdir(exist_ok=True)
        atomic_write(folder / f"epoch-{state.epoch:04d}.png", lambda file: picture.save(file, "PNG"))


class LinearProbe:
    """Adds `val/probe_accuracy`: the accuracy of a linear classifier on the features of a module of the model.

    The classifier is fitted to the features and the classes of the training data after each epoch. Its weights start
    at 0, so it needs no random numbers. Its accuracy depends only on the weights of the model.

    Args:
        part: the name of the module that returns the features, (N, ...); '': the model.
        penalty: the factor of the L2 penalty on the weights of the classifier.
        iterations: the maximum number of iterations of LBFGS.
    """

    def __init__(self, part: str = "", penalty: float = 1e-4, iterations: int = 100) -> None:
        self.part, self.penalty, self.iterations = part, penalty, iterations

    def on_start(self, state: State) -> None:
        """Check that the training data can be read again, that there is a validation set, and that `part` exists.

        Raises:
            ConfigError: one of these conditions does not hold.
        """
        if isinstance(state.loaders["train"], StreamLoader):
            cause = "hooks: LinearProbe reads the training data again after each epoch, and data.train is a stream"
            raise ConfigError(cause, hint="use a data set with items (__getitem__)")
        if "val" not in state.loaders:
            raise ConfigError(
                "hooks: LinearProbe needs a validation set", hint="write data.split=0.2, and not evaluation_step=off"
            )
        names = [name for name, _ in state.model.named_modules()]
        if self.part not in names:
            cause = f"hooks: LinearProbe: the model has no module {self.part!r}"
            raise ConfigError(cause, hint=did_you_mean(self.part, names[1:]))

    def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:
        """Fit the classifier, and add its accuracy on the validation data."""
        module = state.evaluated[0].get_submodule(self.part)
        with evaluating(module), preserve_rng():
            features, classes = collect_features(module, state.loaders["train"].batches(state.epoch - 1))
            val_features, val_classes = collect_features(module, state.loaders["val"].batches(0))
        classify = fit_linear_classifier(features, classes, penalty=self.penalty, iterations=self.iterations)
        metrics["val/probe_accuracy"] = (classify(val_features) == val_classes).double().mean().item()


def collect_features(module: nn.Module, batches: Iterator[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Return the outputs of a module for all batches, (N, F) float64, and the classes, (N,). Both are on the CPU.

    Raises:
        ConfigError: the targets are not classes.
    """
    outputs, targets = [], []
    for inputs, batch_targets in batches:
        if not isinstance(batch_targets, Tensor) or batch_targets.dim() != 1 or batch_targets.is_floating_point():
            cause = f"hooks: LinearProbe needs a class for each sample, found targets {describe(batch_targets)}"
            raise ConfigError(cause, hint="use data with classes, without data.augment.mixup and cutmix")
        outputs.append(module(inputs).flatten(1).double().cpu())
        targets.append(batch_targets.cpu())
    return torch.cat(outputs), torch.cat(targets)


def fit_linear_classifier(
    features: Tensor, classes: Tensor, *, penalty: float, iterations: int
) -> Callable[[Tensor], Tensor]:
    """Fit a logistic regression by LBFGS, from weights of 0. Return the function from features to predicted classes.

    Args:
        features: (N, F). They are standardized to mean 0 and standard deviation 1.
        classes: (N,) int64.
        penalty: the factor of the L2 penalty on the weights.
        iterations: the maximum number of iterations.
    """
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    standardized = (features - mean) / deviation
    weight = torch.zeros(features.shape[1], int(classes.max()) + 1, dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standardized @ weight + bias, classes) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda features: ((features - mean) / deviation @ weight.detach() + bias.detach()).argmax(1)

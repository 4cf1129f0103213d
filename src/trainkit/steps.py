"""Training steps that configs name: a variational autoencoder, a GAN, and two views of each image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def vae(model: nn.Module, images: Tensor, targets: Any, loss_fn: nn.Module, *, beta: float = 1.0) -> dict[str, Any]:  # noqa: ARG001
    """Return the negative evidence lower bound per image, and its two parts.

    Args:
        model: returns the decoded images, and the mean and the log variance of the posterior.
        images: the inputs, (N, ...).
        targets: not used.
        loss_fn: compares the decoded images with the images, as a mean over all pixels: `bce` or `mse`.
        beta: the weight of the KL divergence: https://openreview.net/forum?id=Sy2fzU9gl.
    """
    decoded, mean, log_variance = model(images)
    reconstruction = loss_fn(decoded, images) * images[0].numel()
    kl = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / (2 * len(images))
    return {
        "loss": reconstruction + beta * kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "denominator": len(images),
    }


def gan(model: Any, images: Tensor, targets: Any, loss_fn: nn.Module) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG001
    """Train the discriminator on real and generated images, then the generator to pass as real.

    Args:
        model: has a `generator`, a `discriminator` and the size `latent` of the noise.
        images: the inputs, (N, ...).
        targets: not used.
        loss_fn: compares the discriminator's outputs with 1 for real or 0 for generated: `bce`.
    """
    generated = model.generator(torch.randn(len(images), model.latent, device=images.device))
    real_logits, generated_logits = model.discriminator(images), model.discriminator(generated.detach())
    real, not_real = torch.ones_like(real_logits), torch.zeros_like(real_logits)
    yield "discriminator", loss_fn(real_logits, real) + loss_fn(generated_logits, not_real)
    yield "generator", loss_fn(model.discriminator(generated), real)


def two_views(
    model: nn.Module,
    images: Tensor,
    targets: Any,
    loss_fn: nn.Module,
    *,
    degrees: float = 15.0,
    zoom: float = 0.2,
    shift: float = 0.1,
    contrast: float = 0.4,
) -> Tensor:
    """Return the loss between the outputs for two random views of each image, as `NTXent` takes them.

    Args:
        model: returns a vector for each image.
        images: the inputs, (N, C, H, W).
        targets: passed to the loss.
        loss_fn: compares a pair of outputs, each (N, D).
        degrees: see `random_view`.
        zoom: see `random_view`.
        shift: see `random_view`.
        contrast: see `random_view`.
    """
    views = [random_view(images, degrees, zoom, shift, contrast) for _ in range(2)]
    first, second = model(torch.cat(views)).chunk(2)
    loss: Tensor = loss_fn((first, second), targets)
    return loss


def random_view(images: Tensor, degrees: float, zoom: float, shift: float, contrast: float) -> Tensor:
    """Return each image rotated, scaled and shifted, with another contrast, by random amounts.

    Args:
        images: (N, C, H, W).
        degrees: the maximum angle.
        zoom: the maximum change of the size, as a share of it.
        shift: the maximum shift, as a share of the image.
        contrast: the maximum change of the distance of a pixel from the image's mean, as a share of it.
    """
    draws = 2 * torch.rand(5, len(images), device=images.device, dtype=images.dtype) - 1
    angle, scale = draws[0] * math.radians(degrees), 1 + draws[1] * zoom
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [torch.stack([cos, -sin, 2 * shift * draws[2]], 1), torch.stack([sin, cos, 2 * shift * draws[3]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mean = moved.mean((1, 2, 3), keepdim=True)
    return mean + (moved - mean) * (1 + contrast * draws[4]).view(-1, 1, 1, 1)

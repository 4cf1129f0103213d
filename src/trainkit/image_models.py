"""Small models of images: a variational autoencoder and a DCGAN, which generate them, and an encoder.

A model that generates images has the size `latent` of its noise and a method `sample(noise)`, which the hook
`trainkit.hooks.SampleImages` calls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class VAE(nn.Module):
    """A variational autoencoder of images with one hidden layer on each side.

    Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114. In evaluation mode
    an image is decoded from the mean of its posterior, without noise.

    Shape: (N, *shape) to logits (N, *shape), means (N, latent) and log variances (N, latent).

    Args:
        shape: the shape of an image.
        hidden: the size of the hidden layers.
        latent: the size of the code.
    """

    def __init__(self, shape: Sequence[int] = (3, 32, 32), hidden: int = 256, latent: int = 16) -> None:
        super().__init__()
        pixels, self.shape, self.latent = math.prod(shape), tuple(shape), latent
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU())
        self.mean = nn.Linear(hidden, latent)
        self.log_variance = nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Unflatten(1, self.shape)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the decoded pixels, and the mean and the log variance of the posterior."""
        hidden = self.encoder(images)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean
        if self.training:
            code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance

    def sample(self, noise: Tensor) -> Tensor:
        """Return images from 0 to 1 for noise (N, latent)."""
        images: Tensor = self.decoder(noise).sigmoid()
        return images


class DCGAN(nn.Module):
    """A generator and a discriminator of images, made of strided convolutions with batch norm.

    Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
    Networks", 2016, https://arxiv.org/abs/1511.06434, with their initial weights. The images have values from -1 to 1
    (`data.normalize={mean: 0.5, std: 0.5}`).

    Shape: the generator maps noise (N, latent) to images (N, channels, size, size), the discriminator maps images to
    logits (N, 1), and so does the model itself.

    Args:
        channels: the number of channels of an image.
        size: the height and the width of an image, a power of 2 from 8.
        width: the channels next to the image; each halving of the image doubles them.
        latent: the size of the noise.
    """

    def __init__(self, channels: int = 3, size: int = 32, width: int = 32, latent: int = 64) -> None:
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ValueError(f"size={size} is not a power of 2 from 8")
        self.latent = latent
        widths = [width * 2**level for level in range(int(math.log2(size)) - 2)]  # down to 4x4
        up: list[nn.Module] = [
            nn.Unflatten(1, (latent, 1, 1)),
            nn.ConvTranspose2d(latent, widths[-1], 4, bias=False),
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(),
        ]
        for before, after in itertools.pairwise(reversed(widths)):
            up += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.generator = nn.Sequential(*up, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh())
        down: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(widths):
            down += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.discriminator = nn.Sequential(*down, nn.Conv2d(widths[-1], 1, 4, bias=False), nn.Flatten())
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits that images are real."""
        logits: Tensor = self.discriminator(images)
        return logits

    def sample(self, noise: Tensor) -> Tensor:
        """Return images from 0 to 1 for noise (N, latent)."""
        images: Tensor = (self.generator(noise) + 1) / 2
        return images


class ConvEncoder(nn.Sequential):
    """Convolutions that halve the image, with batch norm and ReLU, then the mean over the pixels.

    Shape: (N, in_channels, H, W) to (N, 2 * width).

    Args:
        in_channels: the number of channels of an image.
        width: the channels of the first convolution; all others have twice as many.
        depth: the number of convolutions.
    """

    def __init__(self, in_channels: int = 3, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        sizes = [in_channels, width] + [2 * width] * (depth - 1)
        for number, (before, after) in enumerate(itertools.pairwise(sizes), start=1):
            self.add_module(f"conv{number}", nn.Conv2d(before, after, 3, 2, 1, bias=False))
            self.add_module(f"norm{number}", nn.BatchNorm2d(after))
            self.add_module(f"relu{number}", nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)

"""The shipped training steps, their models and their losses, against formulas and loops written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from trainkit import steps
from trainkit.core.errors import ConfigError
from trainkit.image_models import DCGAN, VAE, ConvEncoder
from trainkit.losses import NTXent


@pytest.fixture
def images() -> Tensor:
    """Random images (6, 3, 8, 8) from 0 to 1."""
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_parts_of_the_vae_loss_are_those_of_the_evidence_lower_bound(images: Tensor) -> None:
    model = VAE((3, 8, 8), hidden=7, latent=4).eval()
    result = steps.vae(model, images, None, nn.BCEWithLogitsLoss(), beta=0.5)
    logits, mean, log_variance = model(images)
    pixels = F.binary_cross_entropy(logits.sigmoid(), images, reduction="none")
    posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)
    divergence = kl_divergence(posterior, prior)
    assert isinstance(divergence, Tensor)
    torch.testing.assert_close(result["reconstruction"], pixels.flatten(1).sum(1).mean())
    torch.testing.assert_close(result["kl"], divergence.sum(1).mean())
    torch.testing.assert_close(result["loss"], result["reconstruction"] + 0.5 * result["kl"])
    assert result["denominator"] == 6


def test_a_vae_is_random_in_training_mode_alone(images: Tensor) -> None:
    model = VAE((3, 8, 8), hidden=7, latent=4)
    assert not torch.equal(model(images)[0], model(images)[0])
    model.eval()
    assert torch.equal(model(images)[0], model(images)[0])
    assert model.sample(torch.zeros(2, 4)).shape == (2, 3, 8, 8)


def adams(model: DCGAN) -> dict[str, torch.optim.Adam]:
    """Return an Adam for each part of a GAN."""
    return {name: torch.optim.Adam(getattr(model, name).parameters()) for name in ("discriminator", "generator")}


def test_the_gan_step_is_the_tutorial_loop(images: Tensor) -> None:
    ours, loss_fn = DCGAN(size=8, width=4, latent=5), nn.BCEWithLogitsLoss()
    theirs = copy.deepcopy(ours)
    torch.manual_seed(1)
    optimizers, losses = adams(ours), {}
    for name, loss in steps.gan(ours, images, None, loss_fn):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        losses[name] = loss.detach()

    torch.manual_seed(1)
    optimizers, noise = adams(theirs), torch.randn(6, 5)
    generated = theirs.generator(noise)
    real_loss = loss_fn(theirs.discriminator(images), torch.ones(6, 1))
    fake_loss = loss_fn(theirs.discriminator(generated.detach()), torch.zeros(6, 1))
    (real_loss + fake_loss).backward()
    optimizers["discriminator"].step()
    optimizers["generator"].zero_grad()
    generator_loss = loss_fn(theirs.discriminator(generated), torch.ones(6, 1))
    generator_loss.backward()
    optimizers["generator"].step()

    assert torch.equal(losses["discriminator"], (real_loss + fake_loss).detach())
    assert torch.equal(losses["generator"], generator_loss.detach())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_dcgan_generates_images_of_its_size(size: int) -> None:
    model = DCGAN(channels=1, size=size, width=4, latent=5)
    assert model.generator(torch.zeros(2, 5)).shape == (2, 1, size, size)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 1)
    images = model.sample(torch.randn(2, 5)).detach()
    assert 0 <= float(images.min()) <= float(images.max()) <= 1


@pytest.mark.parametrize("size", [4, 24])
def test_a_dcgan_needs_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size} is not a power of 2 from 8"):
        DCGAN(size=size)


def ntxent_by_hand(first: Tensor, second: Tensor, temperature: float) -> float:
    """Return the loss by its formula, view by view."""
    views = [vector.tolist() for vector in [*first.double(), *second.double()]]

    def similarity(a: list[float], b: list[float]) -> float:
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / math.hypot(*a) / math.hypot(*b) / temperature

    total = 0.0
    for i, view in enumerate(views):
        partner = views[(i + len(first)) % len(views)]
        others = [math.exp(similarity(view, other)) for k, other in enumerate(views) if k != i]
        total -= similarity(view, partner) - math.log(sum(others))
    return total / len(views)


def test_ntxent_is_its_formula() -> None:
    first, second = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    loss = NTXent(temperature=0.3)((first, second), None)
    assert float(loss) == pytest.approx(ntxent_by_hand(first, second, 0.3), rel=1e-5)
    assert NTXent.whole_batch


def test_two_views_compares_the_outputs_for_two_views_of_each_image(images: Tensor) -> None:
    model = nn.Flatten()
    seen: list[Any] = []

    class Loss(nn.Module):
        def forward(self, outputs: Any, targets: Any) -> Tensor:
            seen.append((outputs, targets))
            return torch.zeros(())

    steps.two_views(model, images, "targets", Loss())
    (first, second), targets = seen[0]
    assert first.shape == second.shape == (6, 192)
    assert targets == "targets"
    assert not torch.equal(first, second)


def test_a_random_view_without_change_is_the_image(images: Tensor) -> None:
    torch.testing.assert_close(steps.random_view(images, 0, 0, 0, 0), images)


def test_a_random_view_differs_from_image_to_image() -> None:
    same = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    views = steps.random_view(same, degrees=10, zoom=0.1, shift=0.1, contrast=0.1)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 4


def test_a_random_view_of_a_shift_alone_moves_the_image() -> None:
    image = torch.zeros(200, 1, 9, 9)
    image[:, :, 4, 4] = 1.0
    views = steps.random_view(image, degrees=0, zoom=0, shift=1 / 9, contrast=0)
    rows = torch.arange(9.0) - 4
    moved = (views.sum(3)[:, 0] * rows).sum(1)
    assert moved.abs().max() <= 1.001
    assert moved.std() == pytest.approx(1 / 3**0.5, rel=0.15)  # uniform from -1 to 1 pixel


def test_the_encoder_returns_a_vector_for_each_image(images: Tensor) -> None:
    assert ConvEncoder(width=4, depth=2)(images).shape == (6, 8)


def test_a_temperature_of_0_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"loss\.temperature=0: must be above 0"):
        NTXent(temperature=0)

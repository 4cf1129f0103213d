"""Augmented images equal those of loops over pixels, with random numbers from (seed, epoch, sample) alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainkit.core.errors import ConfigError, DataError
from trainkit.data.augment import CUTOUT_DRAWS, MIX_DRAWS, SHIFT_DRAWS, Augment
from trainkit.data.draws import DRAWS, beta_quantiles, uniform_draws
from trainkit.data.prepare import Prepare

Array = np.ndarray[Any, Any]
CPU = torch.device("cpu")
GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1
INDICES = [7, 0, 3, 3, 1000, 12, 5]


def split_mix(state: int) -> Iterator[int]:
    """Yield the numbers of SplitMix64 as the paper defines it."""
    while True:
        state = (state + GAMMA) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def drawn(seed: int, epoch: int, index: int) -> Array:
    """Return all random numbers of a sample in an epoch, (DRAWS,) float32."""
    key = int(np.random.SeedSequence([seed, epoch, 0xA06]).generate_state(1, np.uint64)[0])
    numbers = split_mix((key + GAMMA * DRAWS * index) & MASK)
    return np.array([(next(numbers) >> 40) * 2.0**-24 for _ in range(DRAWS)], dtype=np.float32)


def pictures(count: int = len(INDICES), channels: int = 3, height: int = 7, width: int = 5) -> Tensor:
    """Return noise in which two pixels are hardly ever equal."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def mixed(augment: Augment, images: Tensor, targets: Any, epoch: int = 0) -> tuple[Array, Any]:
    images, targets = augment.cutout_and_mix(images, targets, epoch, torch.tensor(INDICES)[: len(images)])
    return images.numpy(), targets


# ---------------------------------------------------------------------------------------------- draws


def test_split_mix_gives_the_numbers_of_its_reference_implementation() -> None:
    numbers = split_mix(1234567)
    assert [next(numbers) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("epoch", [0, 1, 10**6])
def test_draws_are_the_numbers_of_split_mix_at_the_position_of_the_sample(seed: int, epoch: int) -> None:
    indices = [0, 1, 2, 12345, 10**9]
    wanted = np.stack([drawn(seed, epoch, index) for index in indices], axis=1)
    assert np.array_equal(uniform_draws(seed, epoch, torch.tensor(indices), 0, DRAWS).numpy(), wanted)
    assert np.array_equal(uniform_draws(seed, epoch, torch.tensor(indices), 5, 2).numpy(), wanted[5:7])


def test_no_two_changes_of_a_sample_share_a_number() -> None:
    assert SHIFT_DRAWS + 3 <= CUTOUT_DRAWS <= MIX_DRAWS - 2 <= DRAWS - 6


def test_draws_are_uniform_and_independent_between_numbers_samples_epochs_and_seeds() -> None:
    count = 100_000
    indices = torch.arange(count)
    rows = (
        torch.cat([uniform_draws(seed, epoch, indices, 0, 4) for seed, epoch in ((0, 0), (0, 1), (1, 0))])
        .double()
        .numpy()
    )
    assert rows.min() >= 0
    assert rows.max() < 1
    for row in rows:
        counts = np.histogram(row, bins=100, range=(0, 1))[0]
        assert ((counts - count / 100) ** 2 / (count / 100)).sum() < 99 + 6 * (2 * 99) ** 0.5  # chi-square, 6 sigma
        assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 6 / count**0.5
    for one, other in combinations(rows, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / count**0.5


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1, 2, 8, 20, 100, 2000])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    count = 100_000
    shares = beta_quantiles(alpha, uniform_draws(0, 0, torch.arange(count), MIX_DRAWS, 1)[0]).double().numpy()
    wanted = np.random.default_rng(0).beta(alpha, alpha, count)
    places = np.concatenate([np.geomspace(1e-6, 0.1, 50), np.linspace(0.1, 0.9, 400), 1 - np.geomspace(1e-6, 0.1, 50)])
    ours, numpys = (np.searchsorted(np.sort(values), places) / count for values in (shares, wanted))
    assert ((shares >= 0) & (shares <= 1)).all()
    assert np.abs(ours - numpys).max() < 0.012  # Kolmogorov-Smirnov: exceeded with probability 1e-6


# ------------------------------------------------------------------------------------ flips and crops


@pytest.mark.parametrize("fill", ["zeros", "edge", "reflect"])
@pytest.mark.parametrize("flip", [None, "random", "alternating"])
@pytest.mark.parametrize(("crop", "channels"), [(None, 3), (1, 1), (4, 3)])
def test_images_are_flipped_and_then_cropped_from_the_padded_image(
    flip: str | None, crop: int | None, channels: int, fill: str
) -> None:
    images, margin = pictures(channels=channels), crop or 0
    mode: Any = {"zeros": "constant", "edge": "edge", "reflect": "reflect"}[fill]
    for epoch in (0, 1, 2):
        moved = Augment(3, flip, crop, fill).flip_and_shift(images, epoch, torch.tensor(INDICES))
        assert moved.dtype == images.dtype
        for place, index in enumerate(INDICES):
            numbers, first = drawn(3, epoch, index), drawn(3, 0, index)
            flipped = numbers[SHIFT_DRAWS] < 0.5 if flip == "random" else (first[SHIFT_DRAWS] < 0.5) != (epoch % 2 == 1)
            image = images[place].numpy()
            image = image[:, :, ::-1] if flip and flipped else image
            padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode=mode)
            top, left = (
                int(number * (2 * margin + 1))
                for number in numbers[SHIFT_DRAWS + 1 : SHIFT_DRAWS + 3].astype(np.float64)
            )
            assert np.array_equal(moved[place].numpy(), padded[:, top : top + 7, left : left + 5])


def test_alternating_flips_show_both_sides_of_each_sample_in_two_consecutive_epochs() -> None:
    images, indices = pictures(200), torch.arange(200)
    shown = [Augment(0, flip="alternating").flip_and_shift(images, epoch, indices) for epoch in range(4)]
    assert torch.equal(shown[0], shown[2])
    assert torch.equal(shown[1], shown[3])
    assert torch.equal(shown[0], shown[1].flip(3))
    assert 70 < int((shown[0] != images).flatten(1).any(1).sum()) < 130


def test_all_shifts_and_both_sides_are_equally_frequent() -> None:
    image = torch.arange(1, 16, dtype=torch.uint8).view(1, 1, 3, 5).expand(9000, -1, -1, -1)
    moved = Augment(0, "random", 1, "edge").flip_and_shift(image, 0, torch.arange(9000))
    _, counts = moved.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 18
    assert 380 < int(counts.min()) <= int(counts.max()) < 620  # 500 each


# -------------------------------------------------------------------------------- squares and mixtures


@pytest.mark.parametrize("side", [1, 2, 3])
def test_cutout_sets_a_square_to_0_after_normalising(side: int) -> None:
    images, std = pictures(), torch.tensor(0.25)
    prepare = Prepare(CPU, torch.tensor(0.5), std, Augment(3, cutout=side))
    inputs, targets = prepare(images, torch.arange(7), 2, torch.tensor(INDICES))
    plain = Prepare(CPU, torch.tensor(0.5), std)(images, targets)[0]
    for place, index in enumerate(INDICES):
        down, across = drawn(3, 2, index)[CUTOUT_DRAWS : CUTOUT_DRAWS + 2].astype(np.float64)
        top, left = int(down * 7) - side // 2, int(across * 5) - side // 2
        for row in range(7):
            for column in range(5):
                cut = top <= row < top + side and left <= column < left + side
                wanted = torch.zeros(3) if cut else plain[place, :, row, column]
                assert torch.equal(inputs[place, :, row, column], wanted)


def test_mixup_is_the_weighted_mean_of_a_sample_and_the_sample_before_it_for_images_and_targets() -> None:
    images, labels = pictures().float() / 255, torch.tensor([0, 1, 2, 0, 2, 2, 1])
    got, targets = mixed(Augment(3, mixup=1, classes=3), images, labels, epoch=4)
    for place, index in enumerate(INDICES):
        share = float(drawn(3, 4, index)[MIX_DRAWS + 1])  # alpha = 1: uniform
        wanted = share * images[place].double() + (1 - share) * images[place - 1].double()
        np.testing.assert_allclose(got[place], wanted, atol=1e-6)
        both = share * torch.eye(3)[labels[place]] + (1 - share) * torch.eye(3)[labels[place - 1]]
        torch.testing.assert_close(targets[place], both, atol=1e-6, rtol=0)


def test_cutmix_pastes_a_rectangle_of_the_sample_before_and_mixes_targets_by_area() -> None:
    images, labels = pictures(height=9, width=6).float(), torch.tensor([0, 1, 2, 0, 2, 2, 1])
    got, targets = mixed(Augment(3, cutmix=1, classes=3), images, labels, epoch=4)
    for place, index in enumerate(INDICES):
        _, position, *middle = drawn(3, 4, index)[MIX_DRAWS : MIX_DRAWS + 4]
        side, bounds = np.sqrt(np.float32(1) - position), []
        for size, at in zip((9, 6), middle, strict=True):
            first = int(float(at) * size) - int(np.round(side * size / 2))
            bounds += [max(first, 0), min(first + int(np.round(side * size)), size)]
        wanted, pasted = images[place].numpy().copy(), 0
        for row in range(bounds[0], bounds[1]):
            for column in range(bounds[2], bounds[3]):
                wanted[:, row, column] = images[place - 1, :, row, column]
                pasted += 1
        assert np.array_equal(got[place], wanted)
        both = (1 - pasted / 54) * torch.eye(3)[labels[place]] + pasted / 54 * torch.eye(3)[labels[place - 1]]
        torch.testing.assert_close(targets[place], both, atol=1e-6, rtol=0)


def test_with_mixup_and_cutmix_each_sample_gets_one_of_them_with_equal_probability() -> None:
    own = torch.zeros(4000, 1, 6, 6)
    own[1::2] = 1  # each sample's neighbour is the other
    inputs, targets = Augment(0, mixup=1, cutmix=1, classes=2).cutout_and_mix(
        own, torch.arange(4000) % 2, 0, torch.arange(4000)
    )
    cut = ((inputs == 0) | (inputs == 1)).flatten(1).all(1)
    assert 1800 < int(cut.sum()) < 2200
    torch.testing.assert_close(targets[:, 1], inputs.mean(dim=(1, 2, 3)), atol=1e-6, rtol=0)
    assert torch.equal(targets.sum(1), torch.ones(4000))


@pytest.mark.parametrize("augment", [{"mixup": 0.4}, {"cutmix": 1}, {"mixup": 0.2, "cutmix": 1}], ids=str)
def test_the_loss_of_a_mixed_target_is_the_mixture_of_both_losses(augment: dict[str, float]) -> None:
    labels = torch.tensor([0, 1, 2, 0, 2, 2, 1])
    _, targets = mixed(Augment(3, **augment, classes=3), pictures().float(), labels)  # type: ignore[arg-type]
    _, shares = mixed(Augment(3, **augment), pictures().float(), torch.eye(7))  # type: ignore[arg-type]
    logits = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own, other = (cross_entropy(logits, y, reduction="none") for y in (labels, labels.roll(1)))
    share = shares.diagonal().double()
    wanted = share * own + (1 - share) * other
    torch.testing.assert_close(cross_entropy(logits, targets.double(), reduction="none"), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("targets", [torch.rand(7), torch.rand(7, 1), torch.rand(7, 2, 3), torch.rand(7).double()])
def test_float_targets_are_mixed_directly(targets: Tensor) -> None:
    each, got = mixed(Augment(3, mixup=0.4), torch.eye(7).view(7, 1, 1, 7), targets)
    wanted = torch.from_numpy(each).view(7, 7).to(targets.dtype) @ targets.reshape(7, -1)
    assert got.dtype == targets.dtype
    torch.testing.assert_close(got, wanted.view_as(targets))


def test_uint8_classes_which_cross_entropy_accepts_are_mixed_as_int64_classes() -> None:
    labels = torch.tensor([0, 1, 2, 0, 2, 2, 1])
    got = [mixed(Augment(3, mixup=1, classes=3), pictures().float(), y)[1] for y in (labels, labels.byte())]
    assert torch.equal(*got)


@pytest.mark.parametrize(
    "targets",
    [
        {"label": torch.arange(7)},
        ["a"] * 7,
        torch.zeros(7, 2, dtype=torch.int64),
        torch.full((7,), -100),
        torch.full((7,), 3),
    ],
    ids=["mapping", "words", "matrix", "ignored", "beyond the classes"],
)
def test_targets_that_cannot_be_mixed_are_a_data_error(targets: Any) -> None:
    with pytest.raises(DataError, match=r"data\.augment"):
        mixed(Augment(3, mixup=1, classes=3), pictures().float(), targets)
    with pytest.raises(DataError, match="cannot be mixed"):
        mixed(Augment(3, cutmix=1), pictures().float(), torch.arange(7))  # of how many classes?


# ------------------------------------------------------------------------------------------ of a batch

MOVES: list[dict[str, Any]] = [
    {"flip": "random"},
    {"crop_padding": 2},
    {"cutout": 2},
    {"crop_padding": 1, "cutout": 3, "flip": "random"},
]


@pytest.mark.parametrize("options", MOVES, ids=str)
def test_a_sample_is_the_same_in_every_batch_and_differs_in_other_epochs_and_seeds(
    options: dict[str, Any],
) -> None:
    images, indices = pictures(40), torch.arange(40)

    def seen(seed: int, epoch: int, places: Tensor) -> Tensor:
        prepare = Prepare(CPU, torch.tensor(0.5), torch.tensor(0.25), Augment(seed, **options))
        inputs: Tensor = prepare(images[places], indices[places], epoch, indices[places])[0]
        return inputs

    whole, order = seen(0, 0, indices), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen(0, 0, order), whole[order])
    assert torch.equal(torch.cat([seen(0, 0, part) for part in indices.split(3)]), whole)
    for seed, epoch in ((0, 1), (1, 0), (2**63 - 1, 0)):
        assert not torch.equal(seen(seed, epoch, indices), whole)
    alike = Prepare(CPU, augment=Augment(0, **options))(images[:1].expand(40, -1, -1, -1), indices, 0, indices)[0]
    assert len(alike.unique(dim=0)) > 1


def test_a_batch_mixes_its_own_samples_only_and_a_batch_of_one_sample_is_unchanged() -> None:
    images, labels = pictures().float(), torch.tensor([0, 1, 2, 0, 2, 2, 1])
    for options in ({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}):
        augment = Augment(0, **options, classes=3)  # type: ignore[arg-type]
        got, targets = mixed(augment, images[:1], labels[:1])
        np.testing.assert_allclose(got, images[:1], rtol=1e-6)
        assert targets.tolist() == [[1.0, 0.0, 0.0]]
        assert mixed(augment, images[:0], labels[:0])[1].shape == (0, 3)


@pytest.mark.parametrize("options", [{"mixup": 1}, {"cutmix": 1}, {"flip": "random"}], ids=str)
def test_images_of_one_pixel_can_be_augmented(options: dict[str, Any]) -> None:
    prepare = Prepare(CPU, augment=Augment(0, **options, classes=3))
    inputs, targets = prepare(pictures(height=1, width=1), torch.arange(7) % 3, 0, torch.tensor(INDICES))
    assert inputs.shape == (7, 3, 1, 1)
    assert inputs.isfinite().all()
    assert len(targets) == 7


@pytest.mark.parametrize("inputs", [torch.zeros(7, 5), {"image": pictures()}, pictures()[:, 0], pictures()[:, None]])
@pytest.mark.parametrize("options", [{"flip": "random"}, {"cutout": 2}, {"mixup": 1}], ids=str)
def test_inputs_that_are_not_images_are_a_data_error(inputs: Any, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"not images[^!]*data\.augment=off"):
        Prepare(CPU, augment=Augment(0, **options, classes=7))(inputs, torch.arange(7), 0, torch.tensor(INDICES))


def test_integer_images_that_are_not_converted_to_floats_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match=r"data\.augment"):
        Prepare(CPU, augment=Augment(0, mixup=1, classes=7))(pictures().int(), torch.arange(7), 0, torch.arange(7))


def test_a_crop_larger_than_the_image_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.crop_padding=5: the images are 7 x 5"):
        Augment(0, crop_padding=5).flip_and_shift(pictures(), 0, torch.tensor(INDICES))
    Augment(0, crop_padding=4).flip_and_shift(pictures(), 0, torch.tensor(INDICES))


def test_validation_samples_are_not_augmented() -> None:
    prepare = Prepare(CPU, augment=Augment(0, "random", 2, mixup=1, classes=7))
    inputs, targets = prepare(pictures(), torch.arange(7))
    assert torch.equal(inputs, pictures().float() / 255)
    assert torch.equal(targets, torch.arange(7))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
def test_normalised_inputs_equal_those_of_float64_up_to_rounding(dtype: torch.dtype) -> None:
    mean, std = torch.tensor([0.4914, 0.5, 0.0]), torch.tensor([0.2471, 1e-3, 7.0])
    images = pictures().to(dtype)
    inputs, _ = Prepare(CPU, mean, std)(images, torch.zeros(7))
    exact = images.double() / (255 if dtype == torch.uint8 else 1)
    wanted = (exact - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    assert inputs.is_floating_point()
    torch.testing.assert_close(inputs.double(), wanted, rtol=1e-6, atol=1e-6 * float((mean / std).max()))


@pytest.mark.parametrize("key", ["flip", "crop_padding", "cutmix"])
def test_images_are_not_moved_if_targets_may_be_positions_in_them(key: str) -> None:
    options: dict[str, Any] = {"flip": "random", "crop_padding": 1, "cutmix": 1.0}
    prepare = Prepare(torch.device("cpu"), augment=Augment(0, **{key: options[key]}))
    images, indices = pictures(), torch.tensor(INDICES)
    for targets in (images[:, 0], images.float(), {"boxes": images}, (images, images)):
        with pytest.raises(DataError, match=f"data.augment.{key}: it moves only images"):
            prepare(images, targets, 0, indices)
    Prepare(torch.device("cpu"), augment=Augment(0, cutout=2))(images, images, 0, indices)

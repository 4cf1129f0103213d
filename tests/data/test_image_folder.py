"""Folders of images: the order, the classes and the pixels of torchvision, without its import."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainkit.core.errors import DataError
from trainkit.data import image_folder
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store

CPU = torch.device("cpu")


def folder(top: Path, *classes: str, count: int = 3, size: tuple[int, int] = (40, 36)) -> None:
    from PIL import Image

    for number, name in enumerate(classes):
        (top / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (60 * number, index, 0)).save(top / name / f"{index}.png")


def test_an_image_folder_is_read_with_and_without_parts(here: Path) -> None:
    folder(here / "parts" / "train", "cat", "dog", "eel")
    folder(here / "parts" / "test", "dog")
    train, val = image_folder("parts", size=32), image_folder("parts", "val", size=32)
    assert train is not None
    assert val is not None
    assert train.classes == val.classes == ["cat", "dog", "eel"]
    assert val.targets == [1, 1, 1]  # the class number in the training part
    loader = make_loader(Store.of(train), Prepare(CPU), batch_size=9, seed=None)
    inputs, targets = next(loader.batches(0))
    assert inputs.shape == (9, 3, 32, 32)
    assert inputs[4, 0, 0, 0] == torch.tensor(60.0) / 255
    assert targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    folder(here / "flat", "a", "b")
    flat = image_folder("flat")
    assert flat is not None
    assert len(flat) == 6
    assert image_folder("flat", "val") is None


def test_an_image_folder_without_images_or_with_unknown_classes_is_a_data_error(here: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        image_folder("nowhere")
    (here / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="empty"):
        image_folder("empty")
    folder(here / "odd" / "train", "a")
    folder(here / "odd" / "val", "b")
    with pytest.raises(DataError, match="has no class b"):
        image_folder("odd", "val")


def test_a_class_without_an_image_is_a_data_error(here: Path) -> None:
    folder(here / "photos", "cat")
    (here / "photos" / "dog").mkdir()
    (here / "photos" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="the folder dog has no image"):
        image_folder("photos")


@pytest.mark.parametrize("size", [None, 24, 64])
def test_a_folder_has_the_samples_and_the_pixels_of_torchvision(size: int | None, here: Path) -> None:
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    draw = random.Random(0)
    for number in range(24):
        shape = draw.randrange(20, 90), draw.randrange(20, 90)
        mode = draw.choice(["RGB", "L", "RGBA", "P"])
        pixels = np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)
        name, place = draw.choice(["b", "A", "c.d", "ä"]), draw.choice(["", "deeper", "deeper/still"])
        suffix = "png" if mode in ("RGBA", "P") else draw.choice(["png", "JPG", "jpeg", "bmp"])
        (here / "photos" / name / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(here / "photos" / name / place / f"{number}.{suffix}")
    fit = None if size is None else v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    theirs, ours = ImageFolder("photos", fit), image_folder("photos", size=size)
    assert ours is not None
    assert (ours.classes, ours.class_to_idx, ours.targets) == (theirs.classes, theirs.class_to_idx, theirs.targets)
    assert ours.samples == theirs.samples
    for index in range(len(ours)):
        (image, target), (wanted, wanted_target) = ours[index], theirs[index]
        assert target == wanted_target
        assert np.array_equal(np.asarray(image), np.asarray(wanted))


def test_a_training_on_a_folder_does_not_import_torchvision(here: Path) -> None:
    folder(here / "photos", "a", "b", count=8)
    train = "trainkit.train(trainkit.compose(['model=mlp', 'data=image_folder', 'data.root=photos', 'epochs=1']))"
    code = f"import sys, trainkit; {train}; assert 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

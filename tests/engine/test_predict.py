"""Predictions for files: they agree with the evaluation, and with torch code written by hand."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import trainkit
from trainkit.core.errors import CheckpointError, ConfigError, DataError, UserCodeError
from trainkit.data.file_search import natural_key
from trainkit.engine.predict_text import _windows
from trainkit.runs.directory import Run

NORMALIZE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
QUIET = ["progress=off", "report=off"]


def train(directory: Path, *overrides: str) -> Run:
    """Return a run that was trained with these overrides."""
    return trainkit.train(trainkit.compose([*QUIET, *overrides]), directory=directory)


def rows_of(run: Run, *files: Path | str, **options: Any) -> list[dict[str, Any]]:
    """Return the predictions for files."""
    return list(trainkit.predict(run, files, **options))


# -------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three classes, in several modes and sizes, with a validation part."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 9)):
        for label, name in enumerate(("ant", "bee", "cow")):
            (root / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 120, (20 + 3 * index, 40 - index, 3), dtype=np.uint8)
                pixels[..., label] += 100
                mode = ("RGB", "L", "RGBA", "CMYK")[index % 4]
                suffix = "jpg" if mode == "CMYK" or (index % 3 == 0 and mode != "RGBA") else "png"
                exif = Image.Exif()
                exif[0x112] = 6  # turned by 90 degrees
                image = Image.fromarray(pixels).convert(mode)
                image.save(root / part / name / f"{index}.{suffix}", exif=exif)
    return root


@pytest.fixture(scope="module")
def image_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the images."""
    data = [
        "data=image_folder",
        f"data.root={images}",
        "data.size=24",
        "data.normalize=" + str(NORMALIZE).replace("'", ""),
    ]
    own = [
        "model={_target_: tests.engine.test_predict.SmallNet}",
        "epochs=2",
        "batch_size=8",
        "data.augment.flip=random",
    ]
    return train(tmp_path_factory.mktemp("image_run") / "run", *data, *own, "data.num_workers=0", "lr=0.05")


class SmallNet(nn.Sequential):
    """A convolution, and one output for each class. What it predicts depends on the direction of an image."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(100, num_classes))


@functools.cache
def loaded(directory: Path) -> nn.Module:
    """Return the model of a run."""
    return trainkit.load(directory)


def by_hand(run: Run, file: Path | str, *, flip: bool = False) -> Tensor:
    """Return the probabilities for an image, in plain torch."""
    resize = v2.Compose([v2.Resize(24), v2.CenterCrop(24)])
    pixels = torch.from_numpy(np.array(resize(Image.open(file).convert("RGB")))).permute(2, 0, 1).double() / 255
    if flip:
        pixels = pixels.flip(2)
    mean, std = (torch.tensor(NORMALIZE[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        logits: Tensor = loaded(run.directory)(((pixels - mean) / std).float()[None])
    return logits.softmax(1)[0]


def test_the_predicted_classes_give_exactly_the_accuracy_of_the_validation(image_run: Run, images: Path) -> None:
    rows = rows_of(image_run, images / "val")
    assert len(rows) == 27
    correct = sum(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert image_run.best is not None
    assert correct / len(rows) == image_run.best["val/accuracy"]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_probabilities_are_the_softmax_of_the_outputs(image_run: Run, images: Path, batch_size: int) -> None:
    rows = rows_of(image_run, images / "val", batch_size=batch_size, top=3, probabilities=True)
    for row in rows:
        expected = by_hand(image_run, row["file"])
        found = torch.tensor([row["probabilities"][name] for name in ("ant", "bee", "cow")])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        ranked = [row[key] for key in ("probability", "probability_2", "probability_3")]
        assert ranked == sorted(row["probabilities"].values(), reverse=True)
        assert row["probabilities"][row["class_2"]] == row["probability_2"]


def test_the_training_data_is_not_needed(image_run: Run, images: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(image_run.directory, tmp_path / "run")
    config = copied / ".hydra/config.yaml"
    assert str(images) in config.read_text()
    moved = shutil.copytree(images / "val", tmp_path / "val")
    images.rename(images.with_name("hidden"))
    try:
        rows = rows_of(Run.load(copied), moved)
    finally:
        images.with_name("hidden").rename(images)
    assert [row["class"] for row in rows] == [row["class"] for row in rows_of(image_run, images / "val")]


def test_flip_averages_the_probabilities_of_an_image_and_its_mirror_image(image_run: Run, images: Path) -> None:
    for row in rows_of(image_run, images / "val/bee", flip=True, probabilities=True):
        expected = (by_hand(image_run, row["file"]) + by_hand(image_run, row["file"], flip=True)) / 2
        torch.testing.assert_close(torch.tensor([*row["probabilities"].values()]), expected, rtol=1e-4, atol=1e-6)


def test_files_that_cannot_be_read_are_reported_and_the_others_are_predicted(image_run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "2.png")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "10.png")
    Image.effect_noise((90, 90), 50).save(tmp_path / "3.jpg")
    content = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "4.jpg").write_text("a text")
    (tmp_path / "5.gif").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".6.png").touch()
    reported: dict[str, str] = {}
    notes: list[str] = []
    names = [tmp_path, tmp_path / "2.png"]
    rows = rows_of(
        image_run,
        *names,
        on_unreadable=lambda place, why: reported.update({Path(place["file"]).name: why}),
        on_note=notes.append,
    )
    assert [Path(row["file"]).name for row in rows] == ["2.png", "10.png", "2.png"]
    assert [*reported] == ["3.jpg", "4.jpg", "5.gif"]
    assert "truncated" in reported["3.jpg"]
    assert reported["4.jpg"] == "cannot identify image file"
    assert notes == [f"note: {tmp_path}: left out 1 other file"]
    with pytest.raises(DataError, match=r"3\.jpg: image file is truncated"):
        rows_of(image_run, tmp_path)


def test_a_missing_path_is_an_error_before_the_run_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lost\.png and 1 more: there is no such file or folder"):
        trainkit.predict(tmp_path / "no run", [tmp_path, tmp_path / "lost.png", "other.png"])


def test_a_folder_without_images_is_an_error(image_run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="this folder has no images"):
        rows_of(image_run, tmp_path)


def test_files_are_in_natural_order() -> None:
    names = ["b.png", "img10.png", "img2.png", "img02.png", "10.png", "9.png", "a/1.png", "²³.png"]
    expected = ["9.png", "10.png", "a/1.png", "b.png", "img02.png", "img2.png", "img10.png", "²³.png"]
    assert sorted(names, key=natural_key) == expected


def test_a_run_without_the_file_needs_its_data_and_predicts_the_same(
    image_run: Run, images: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(image_run.directory, tmp_path / "run")
    (older / "preprocessing.json").unlink()
    assert rows_of(Run.load(older), images / "val") == rows_of(image_run, images / "val")


@pytest.mark.parametrize(
    "reader",
    [
        {"kind": "images", "mode": "LAB"},
        {"kind": "images", "size": -1},
        {"kind": "images", "size": [1, 2, 3]},
        {"kind": "table", "columns": {"a": 3}, "fill": None, "targets": []},
        {"kind": "table", "columns": [], "fill": None, "targets": []},
        {"kind": "table", "columns": {"a": None}, "fill": {}, "targets": []},
        {"kind": "table", "columns": {"a": None}, "fill": "mean", "targets": []},
        {"kind": "table"},
        {"kind": "text", "unit": "letters"},
    ],
)
def test_a_damaged_reader_is_refused(image_run: Run, images: Path, tmp_path: Path, reader: dict[str, Any]) -> None:
    copied = shutil.copytree(image_run.directory, tmp_path / "run")
    written = json.loads((copied / "preprocessing.json").read_text())
    (copied / "preprocessing.json").write_text(json.dumps({**written, "reader": reader}))
    with pytest.raises(CheckpointError, match=r"the reader in the preprocessing\.json of the run is damaged"):
        rows_of(Run.load(copied), images / "val")


def test_an_unknown_kind_of_reader_is_an_error_that_says_what_to_add(
    image_run: Run, images: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(image_run.directory, tmp_path / "run")
    written = json.loads((copied / "preprocessing.json").read_text())
    (copied / "preprocessing.json").write_text(json.dumps({**written, "reader": {"kind": "tokens"}}))
    with pytest.raises(ConfigError, match=r"files of the kind 'tokens'(.|\n)*read_input"):
        rows_of(Run.load(copied), images / "val")


def test_images_fit_a_data_set_that_only_has_their_shape(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "epochs=1", "limit_batches=2")  # the digits have no names and no reader
    sample = trainkit.data.digits()[5][0]
    Image.fromarray(sample.permute(1, 2, 0).numpy()).save(tmp_path / "five.png")
    notes: list[str] = []
    (row,) = rows_of(run, tmp_path / "five.png", on_note=notes.append)
    with torch.no_grad():
        expected = trainkit.load(run)(sample[None] / 255).softmax(1)[0]
    assert row["class"] == int(expected.argmax())
    assert row["probability"] == pytest.approx(float(expected.max()), rel=1e-5)
    assert notes == ["note: images are cropped to the ratio of 32x32 pixels, and resized to them"]
    np.save(tmp_path / "x.npy", sample.numpy()[None].repeat(3, 0))
    torch.save(sample, tmp_path / "x.pt")
    rows = rows_of(run, tmp_path / "x.npy", tmp_path / "x.pt")
    assert [row.get("row") for row in rows] == [1, 2, 3, None]
    assert [row["class"] for row in rows] == [row["class"]] * 4
    np.save(tmp_path / "y.npy", np.full((3, 32, 32), 300))
    np.save(tmp_path / "z.npy", np.zeros((4, 2), dtype=np.uint8))
    for name, reason in (("y.npy", "the array is int64, and the training has uint8"), ("z.npy", "has the shape")):
        with pytest.raises(DataError, match=reason):
            rows_of(run, tmp_path / name)


# -------------------------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables of a training and of a validation."""
    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(1)
    for name, number in (("train", 120), ("val", 31)):
        lines = ["size,city,price,big"]
        for size in rng.uniform(0, 5, number):
            city = ("Bern", "Rome", "01")[int(size * 10) % 3]
            lines.append(f"{size},{city},{3 * size + (city == 'Bern')},{'yes' if size > 2 else 'no'}")
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return folder


def table_options(table: Path, target: str, drop: str) -> list[str]:
    """Return the overrides of a training on the table."""
    files = [f"data.file={table / 'train.csv'}", f"data.val_file={table / 'val.csv'}"]
    return ["data=table", *files, f"data.target={target}", f"data.drop=[{drop}]", "model=mlp", "model.hidden=[8]"]


@pytest.fixture(scope="module")
def classes_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A classification of the rows."""
    return train(tmp_path_factory.mktemp("run") / "run", *table_options(table, "big", "price"), "epochs=3", "lr=0.1")


@pytest.fixture(scope="module")
def prices_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A regression."""
    return train(
        tmp_path_factory.mktemp("run") / "run",
        *table_options(table, "price", "big"),
        "loss=mse",
        "model.out_features=1",
        "epochs=3",
        "lr=0.01",
    )


def encoded(table: Path) -> Tensor:
    """Return the inputs of the validation rows: standardized by hand, in float64."""

    def columns(name: str) -> np.ndarray[Any, Any]:
        rows = [line.split(",") for line in (table / f"{name}.csv").read_text().splitlines()[1:]]
        hot = [[float(row[1] == city) for city in ("01", "Bern", "Rome")] for row in rows]
        return np.array([[np.float32(row[0]), *cells] for row, cells in zip(rows, hot, strict=True)], dtype=np.float64)

    train_rows = columns("train")
    return torch.tensor((columns("val") - train_rows.mean(0)) / train_rows.std(0))


def test_the_rows_of_a_table_get_the_classes_of_the_validation(classes_run: Run, table: Path) -> None:
    rows = rows_of(classes_run, table / "val.csv", probabilities=True, on_note=lambda _: None)
    targets = [line.split(",")[3] for line in (table / "val.csv").read_text().splitlines()[1:]]
    correct = sum(row["class"] == target for row, target in zip(rows, targets, strict=True))
    assert classes_run.best is not None
    assert correct / len(rows) == classes_run.best["val/accuracy"]
    with torch.no_grad():
        expected = trainkit.load(classes_run).double()(encoded(table)).softmax(1)
    found = torch.tensor([[row["probabilities"][name] for name in ("no", "yes")] for row in rows]).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert [row["row"] for row in rows] == [*range(1, 32)]


def test_a_regression_predicts_numbers_under_the_name_of_the_target(prices_run: Run, table: Path) -> None:
    rows = rows_of(prices_run, table / "val.csv")
    with torch.no_grad():
        expected = trainkit.load(prices_run).double()(encoded(table))[:, 0]
    torch.testing.assert_close(torch.tensor([row["price"] for row in rows]).double(), expected, rtol=1e-4, atol=1e-5)
    targets = torch.tensor([float(line.split(",")[2]) for line in (table / "val.csv").read_text().splitlines()[1:]])
    loss = ((torch.tensor([row["price"] for row in rows]) - targets) ** 2).mean()
    assert prices_run.best is not None
    assert float(loss) == pytest.approx(prices_run.best["val/loss"], rel=1e-5)


def test_options_for_classes_have_no_effect_on_numbers_and_a_note_says_so(prices_run: Run, table: Path) -> None:
    notes: list[str] = []
    rows = rows_of(prices_run, table / "val.csv", top=2, probabilities=True, on_note=notes.append)
    assert rows == rows_of(prices_run, table / "val.csv")
    assert notes[1:] == ["note: --top and --probabilities have no effect, because this run does not predict classes"]


def test_a_table_may_lack_the_target_and_have_other_columns(prices_run: Run, table: Path, tmp_path: Path) -> None:
    whole = rows_of(prices_run, table / "val.csv")
    rows = [line.split(",") for line in (table / "val.csv").read_text().splitlines()[1:]]
    (tmp_path / "new.tsv").write_text("\n".join(["id\tcity\tsize", *(f"7\t{row[1]}\t{row[0]}" for row in rows)]))
    notes: list[str] = []
    found = rows_of(prices_run, tmp_path / "new.tsv", on_note=notes.append)
    assert [row["price"] for row in found] == [row["price"] for row in whole]
    assert notes == [f"note: {tmp_path / 'new.tsv'}: the model does not use id"]


def test_words_that_are_numbers_stay_words(prices_run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("size,city\n1,01\n")
    (tmp_path / "b.csv").write_text("size,city\n1,01\n1,Bern\n")
    assert rows_of(prices_run, tmp_path / "a.csv")[0]["price"] == rows_of(prices_run, tmp_path / "b.csv")[0]["price"]


def test_a_missing_number_of_a_new_row_gets_the_mean_of_the_training(table: Path, tmp_path: Path) -> None:
    options = [*table_options(table, "price", "big"), "data.fill=mean", "loss=mse", "model.out_features=1", "epochs=1"]
    run = train(tmp_path / "run", *options)
    sizes = [float(line.split(",")[0]) for line in (table / "train.csv").read_text().splitlines()[1:]]
    (tmp_path / "new.csv").write_text(f"size,city\n,Bern\n{math.fsum(sizes) / len(sizes)!r},Bern\n4,Bern\n")
    missing, mean, other = (row["price"] for row in rows_of(run, tmp_path / "new.csv"))
    assert missing == mean != other


def test_wrong_rows_of_a_table_are_reported_and_the_others_are_predicted(prices_run: Run, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("size,city\n1,Bern\n2,Oslo\n,01\nbig,01\n1e99,01\n2,01\n")
    (tmp_path / "lack.csv").write_text("size\n1\n")
    (tmp_path / "bad.csv").write_bytes(b"size,city\n1,\xff\n")
    reported: list[tuple[Any, str]] = []
    files = [tmp_path / name for name in ("new.csv", "lack.csv", "bad.csv")]
    rows = rows_of(prices_run, *files, on_unreadable=lambda place, why: reported.append((place.get("row"), why)))
    assert [row["row"] for row in rows] == [1, 6]
    assert [place for place, _ in reported] == [2, 3, 4, 5, None, None]
    assert [why for _, why in reported] == [
        "the training set has no value 'Oslo' in the column 'city'",
        "the column 'size' has no value in row 3",
        "row 4 of the column 'size' is 'big', not a number",
        "row 5 of the column 'size' is 1e+99, outside of float32",
        "it has no column 'city'",
        "byte 12 is not UTF-8",
    ]


# --------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small language model of characters."""
    small = ["model=gpt", "model.width=8", "model.depth=1", "model.heads=2", "data.length=16"]
    return train(tmp_path_factory.mktemp("run") / "run", "data=text", *small, "epochs=1", "limit_batches=10", "lr=0.5")


def test_a_line_gets_the_likelihood_of_its_tokens_and_the_next_token(text_run: Run, tmp_path: Path) -> None:
    lines = ["the king", "", "x", "speak, good", "ßé", "a" * 16]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\r\n")
    rows = rows_of(text_run, tmp_path / "lines.txt", top=2, batch_size=4)
    vocabulary = json.loads((text_run.directory / "preprocessing.json").read_text())["classes"]
    model = trainkit.load(text_run)
    for line, row in zip(lines, rows, strict=True):
        ids = torch.tensor([vocabulary.index(c) if c in vocabulary else 0 for c in line], dtype=torch.int64)
        assert row["tokens"] == len(line)
        if not line:
            assert row["log_likelihood"] is row["perplexity"] is row["next"] is row["probability"] is None
            continue
        with torch.no_grad():
            found = model(ids[None])[0].log_softmax(0)
        if len(line) > 1:
            expected = float(found[:, :-1].gather(0, ids[None, 1:]).mean())
            assert row["log_likelihood"] == pytest.approx(expected, rel=1e-5)
            assert row["perplexity"] == pytest.approx(np.exp(-expected), rel=1e-5)
        assert row["next"] == vocabulary[int(found[:, -1].argmax())]
        best = found[:, -1].exp().topk(2).values.tolist()
        assert [row["probability"], row["probability_2"]] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7, 8, 9, 23])
def test_each_token_of_a_long_line_is_scored_once(tokens: int) -> None:
    scored = []
    for start, stop, first in _windows(tokens, 4):
        assert stop - start == min(4, tokens)
        assert start <= first
        scored += [*range(first, stop)]
    assert scored == [*range(tokens)]
    assert stop == tokens


def test_a_long_line_has_the_likelihood_of_its_windows(text_run: Run, tmp_path: Path) -> None:
    line = "we proceed any further, hear me speak"
    (tmp_path / "line.txt").write_text(line)
    (row,) = rows_of(text_run, tmp_path / "line.txt")
    vocabulary = json.loads((text_run.directory / "preprocessing.json").read_text())["classes"]
    ids = torch.tensor([vocabulary.index(c) for c in line])
    model, total = trainkit.load(text_run), 0.0
    with torch.no_grad():
        for position in range(len(line) - 1):
            start = min(position // 16 * 16, len(line) - 16)
            found = model(ids[None, start : start + 16])[0].log_softmax(0)
            total += float(found[ids[position + 1], position - start])
        last = model(ids[None, -16:])[0, :, -1]
    assert row["log_likelihood"] == pytest.approx(total / (len(line) - 1), rel=1e-5)
    assert row["next"] == vocabulary[int(last.argmax())]


def test_a_line_that_is_not_utf8_is_reported(text_run: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"good\nb\xffd\ngood\n")
    reported: list[Any] = []
    rows = rows_of(text_run, tmp_path / "lines.txt", on_unreadable=lambda place, why: reported.append((place, why)))
    assert [row["line"] for row in rows] == [1, 3]
    assert [(place["line"], why) for place, why in reported] == [(2, "byte 1 is not UTF-8")]


# ------------------------------------------------------------------------------- other outputs

MODULE = """
from pathlib import Path
import torch
from torch import nn

class Sounds:
    '''Samples (6,) float32 of files of numbers.'''

    def __init__(self, targets="binary", size=40):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 6, generator=generator)
        first = self.x[:, :1]
        self.y = {
            "binary": (first > 0).float(),
            "labels": (self.x[:, :3] > 0).float(),
            "numbers": self.x[:, :2] * 2,
            "maps": (self.x > 0).long(),
            "none": first,
        }[targets]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]

    HOOK

class Maps(nn.Linear):
    def forward(self, x):
        return super().forward(x).unflatten(1, (2, 6))

class Parts(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return {"score": y, "pair": (y.sum(1), "text")}

def first(outputs, targets):
    return outputs["score"].mean()
"""
HOOK = """
    @staticmethod
    def read_input(file):
        values = [float(word) for word in Path(file).read_text().split()]
        if len(values) != 6:
            raise OSError("a file needs 6 numbers")
        return torch.tensor(values)
"""


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that trains on a custom data set, and returns the run, its inputs, and a file for each of them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sounds", raising=False)

    def run(targets: str, *overrides: str, hook: str = HOOK) -> tuple[Run, Tensor, list[Path]]:
        (tmp_path / "sounds.py").write_text(MODULE.replace("HOOK", hook))
        own = ["data.train={_target_: sounds.Sounds, targets: " + targets + "}", "data.val=null", "data.split=0.2"]
        made = train(tmp_path / "run", *own, "epochs=1", "data.augment.flip=off", *overrides)
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        files = [tmp_path / f"{index}.txt" for index in range(5)]
        for file, values in zip(files, inputs.tolist(), strict=True):
            file.write_text(" ".join(map(repr, values)))
        return made, inputs, files

    return run


def linear(outputs: int, target: str = "torch.nn.Linear") -> str:
    """Return the override of a model with six inputs."""
    return f"model={{_target_: {target}, in_features: 6, out_features: {outputs}}}"


def test_one_output_of_a_binary_cross_entropy_is_a_probability(sounds: Any) -> None:
    run, inputs, files = sounds("binary", linear(1), "loss=bce")
    rows = rows_of(run, *files, top=2)
    with torch.no_grad():
        expected = trainkit.load(run)(inputs)[:, 0].sigmoid().tolist()
    for row, probability in zip(rows, expected, strict=True):
        assert row["class"] == int(probability > 0.5)
        assert row["probability"] == pytest.approx(max(probability, 1 - probability), rel=1e-5)
        assert row["probability"] + row["probability_2"] == pytest.approx(1)


def test_several_labels_have_a_probability_each(sounds: Any) -> None:
    run, inputs, files = sounds("labels", linear(3), "loss=bce")
    with torch.no_grad():
        expected = trainkit.load(run)(inputs).sigmoid().tolist()
    for row, probabilities in zip(rows_of(run, *files), expected, strict=True):
        assert row["classes"] == [index for index, value in enumerate(probabilities) if value > 0.5]
        assert [*row["probabilities"].values()] == pytest.approx(probabilities, rel=1e-5)


def test_several_numbers_are_columns(sounds: Any) -> None:
    run, inputs, files = sounds("numbers", linear(2), "loss=mse")
    with torch.no_grad():
        expected = trainkit.load(run)(inputs).tolist()
    found = [[row["prediction_1"], row["prediction_2"]] for row in rows_of(run, *files)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_class_for_each_position_is_a_nested_list(sounds: Any) -> None:
    run, inputs, files = sounds("maps", linear(12, "sounds.Maps"), "data.classes=2")
    with torch.no_grad():
        expected = trainkit.load(run)(inputs).argmax(1).tolist()
    assert [row["map"] for row in rows_of(run, *files)] == expected


def test_other_outputs_are_nested_lists(sounds: Any) -> None:
    run, inputs, files = sounds("none", linear(2, "sounds.Parts"), "loss._target_=sounds.first")
    with torch.no_grad():
        score = trainkit.load(run)(inputs)["score"]
    rows = rows_of(run, *files)
    np.testing.assert_allclose([row["outputs"]["score"] for row in rows], score, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([row["outputs"]["pair"][0] for row in rows], score.sum(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="--flip: the inputs of this model are not images"):
        rows_of(run, *files, flip=True)


def test_read_input_of_a_custom_set_reads_its_files(sounds: Any, tmp_path: Path) -> None:
    run, _, files = sounds("binary", linear(1), "loss=bce")
    (tmp_path / "short.txt").write_text("1 2")
    (tmp_path / "wrong.txt").write_text("a b")
    reported: list[str] = []
    rows = rows_of(run, files[0], tmp_path / "short.txt", on_unreadable=lambda _, why: reported.append(why))
    assert len(rows) == 1
    assert reported == ["a file needs 6 numbers"]
    with pytest.raises(UserCodeError, match=r"data\.read_input: ValueError: could not convert string to float: 'a'"):
        rows_of(run, tmp_path / "wrong.txt")


def test_without_a_reader_the_error_says_how_to_add_it(sounds: Any) -> None:
    run, inputs, files = sounds("binary", linear(1), "loss=bce", hook="")
    with pytest.raises(ConfigError, match=r"does not say how a file becomes a sample of sounds\.Sounds") as caught:
        rows_of(run, *files)
    assert "static method read_input(file)" in str(caught.value)
    array = files[0].with_name("all.npy")
    np.save(array, inputs.double().numpy())
    with torch.no_grad():
        expected = trainkit.load(run)(inputs)[:, 0].sigmoid()
    rows = rows_of(run, array)
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["class"] for row in rows] == (expected > 0.5).int().tolist()


def test_names_that_are_not_utf8_keep_their_bytes(image_run: Run, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b'/\xff, "a"\nb.png')
    Image.new("RGB", (9, 9)).save(name, format="PNG")
    assert [row["file"] for row in rows_of(image_run, tmp_path)] == [name]

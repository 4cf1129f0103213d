"""The file `preprocessing.json`: what a run writes, and what reading it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

import trainkit
from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import CheckpointError
from trainkit.engine.preprocessing import class_names, describe_preprocessing, preprocessing_of_run
from trainkit.runs.directory import Run
from trainkit.runs.preprocessing import FILE, Preprocessing, Statistics, read_preprocessing, write_preprocessing
from trainkit.runs.reload import reload_config

MODULE = """
import torch

class Pairs:
    '''Samples of two inputs and a text, without a length of the second input in common.'''
    reader = {reader}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {{"image": torch.zeros(1, 4, 5, dtype=torch.uint8), "parts": (torch.zeros(2), "words")}}, index % 2

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(20, 2)

    def forward(self, inputs):
        return self.linear(inputs["image"].flatten(1))
"""


def described(*overrides: str) -> Preprocessing:
    """Return the preprocessing of a training that has not started."""
    session = build_session(compose_settings(overrides))
    return describe_preprocessing(session.settings, session.train)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table with a column of numbers, a column of words and a column of classes."""
    file = tmp_path / "table.csv"
    rows = [f"{number / 7},{'ab'[number % 2]},{'xyz'[number % 3]}" for number in range(30)]
    file.write_text("\n".join(["size,kind,class", *rows]))
    return file


def test_a_run_writes_the_form_of_its_inputs_and_its_normalization(tmp_path: Path) -> None:
    overrides = ["data.normalize={mean: 0.5, std: [0.1, 0.2, 0.3]}", "epochs=1", "limit_batches=1", "progress=off"]
    run = trainkit.train(trainkit.compose(overrides), directory=tmp_path / "run")
    written = json.loads((run.directory / FILE).read_text())
    assert written["inputs"] == {"shape": [3, 32, 32], "dtype": "uint8"}
    assert written["normalize"] == {"mean": [0.5] * 3, "std": [0.1, 0.2, 0.3]}
    assert written["standardize"] is None
    assert written["classes"] is None  # the digits have no names
    assert Preprocessing(**{key: value for key, value in written.items() if key != "format"}).reader is None
    assert read_preprocessing(run) == preprocessing_of_run(run, reload_config(run, []).settings)


def test_a_resume_writes_the_file_that_an_older_run_lacks(tmp_path: Path) -> None:
    settings = ["epochs=1", "limit_batches=1", "progress=off"]
    run = trainkit.train(trainkit.compose(settings), directory=tmp_path / "run")
    written = (run.directory / FILE).read_text()
    (run.directory / FILE).unlink()
    assert read_preprocessing(run) is None
    assert preprocessing_of_run(run, reload_config(run, []).settings).inputs == json.loads(written)["inputs"]
    trainkit.resume(run.directory, ["epochs=2"])
    assert (run.directory / FILE).read_text() == written


def test_the_statistics_are_those_of_the_training_samples_in_float64(table: Path) -> None:
    found = described("data=table", f"data.file={table}", "data.target=class", "model=mlp")
    session = build_session(compose_settings(["data=table", f"data.file={table}", "data.target=class", "model=mlp"]))
    rows = session.train.dataset
    inputs = torch.stack([rows[index][0] for index in range(len(rows))]).double()
    assert found.standardize is not None
    np.testing.assert_allclose(found.standardize.mean, inputs.mean(0), rtol=1e-15)
    np.testing.assert_allclose(found.standardize.std, inputs.std(0, correction=0), rtol=1e-14)


def test_a_table_says_its_columns_words_and_classes(table: Path) -> None:
    found = described("data=table", f"data.file={table}", "data.target=class", "model=mlp", "data.fill=2")
    assert found.classes == ["x", "y", "z"]
    columns = {"size": None, "kind": ["a", "b"]}
    assert found.reader == {"kind": "table", "columns": columns, "fill": 2, "targets": ["class"]}


def test_an_image_folder_says_its_size_and_its_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    for cache in ("auto", "none"):  # held in memory, and read one by one
        found = described("data=image_folder", f"data.root={tmp_path}", "data.size=16", f"data.cache={cache}")
        assert found.classes == ["cat", "dog"]
        assert found.reader == {"kind": "images", "mode": "RGB", "size": 16}
        assert found.inputs == {"shape": [3, 16, 16], "dtype": "uint8"}


def test_the_classes_of_a_text_are_its_vocabulary() -> None:
    found = described("data=text", "model=gpt", "model.width=8", "model.heads=1", "model.depth=1", "data.length=16")
    assert found.reader == {"kind": "text", "unit": "characters", "length": 16}
    assert found.classes is not None
    assert found.classes[0] == "<unk>"
    assert {"a", "\n"} <= set(found.classes)
    assert found.inputs == {"shape": [16], "dtype": "int64"}


@pytest.mark.parametrize(
    "reader", [{"kind": "images", "size": 4}, None, {"kind": 3}, "open", {"kind": "x", "f": print}]
)
def test_a_custom_set_may_say_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    text = str(reader).replace("<built-in function print>", "print")
    text = f"'{text}'" if isinstance(reader, str) else text
    (tmp_path / "own_reader.py").write_text(MODULE.format(reader=text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_reader", raising=False)
    own = ["data.train={_target_: own_reader.Pairs}", "data.val=null", "data.split=off", "data.classes=2"]
    found = described(*own, "model={_target_: own_reader.Net}", "data.augment.flip=off")
    assert found.reader == (reader if reader == {"kind": "images", "size": 4} else None)
    leaf = {"shape": [1, 4, 5], "dtype": "uint8"}
    assert found.inputs == {"image": leaf, "parts": [{"shape": [2], "dtype": "float32"}, {"type": "str"}]}


WRITTEN = Preprocessing(
    {"image": {"shape": [3, 8, 8], "dtype": "uint8"}, "shape": {"shape": [], "dtype": "int64"}},
    normalize=Statistics([0.1], [1e-30]),
    standardize=Statistics([1 / 3, -1e300], [5e-324, 7.0]),
    classes=["a", "naïve, \n", ""],
    reader={"kind": "images", "mode": "RGB", "size": None},
)


def test_what_is_written_is_read_again_to_the_bit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    write_preprocessing(run, WRITTEN)
    assert read_preprocessing(run) == WRITTEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[]", "JSON object"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ({"format": 2}, "format is '2', expected 1"),
        ({"classes": {"a": 1}}, "classes is not a list of names"),
        ({"classes": [1]}, "classes is not a list of names"),
        ({"reader": "images"}, "reader is not an object with a kind"),
        ({"reader": {"kind": 1}}, "reader is not an object with a kind"),
        ({"inputs": 3}, "inputs contain '3'"),
        ({"inputs": {"shape": [-1], "dtype": "uint8"}}, "expected a list of sizes"),
        ({"inputs": {"shape": [True], "dtype": "uint8"}}, "expected a list of sizes"),
        ({"normalize": [1, 2]}, "normalize is"),
        ({"normalize": {"mean": [0.5], "std": [0.0]}}, "normalize is"),
        ({"standardize": {"mean": [0.5], "std": [1, 2]}}, "standardize is"),
        ({"standardize": {"mean": [float("nan")], "std": [1]}}, "standardize is"),
        ({"standardize": {"mean": "1", "std": "2"}}, "standardize is"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    run = Run(tmp_path)
    write_preprocessing(run, WRITTEN)
    written = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(change if isinstance(change, str) else json.dumps({**written, **change}))
    with pytest.raises(CheckpointError, match=r"preprocessing\.json is damaged: ") as caught:
        read_preprocessing(run)
    assert message in str(caught.value)


def test_a_link_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="it is a link"):
        read_preprocessing(Run(tmp_path))


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["a", "b"], ["a", "b"]),
        ((3, 7), ["3", "7"]),
        (torch.tensor(10), None),
        (10, None),
        (None, None),
        ("ab", None),
        ({"a": 0, "b": 1}, None),
        ({"a", "b"}, None),  # it has no order
    ],
)
def test_classes_have_the_names_that_a_data_set_lists_in_order(classes: object, names: list[str] | None) -> None:
    dataset = SimpleNamespace(classes=classes)
    assert class_names(dataset) == names
    assert class_names(Subset(dataset, [])) == names  # type: ignore[arg-type]

"""Errors of a user's data set name the config key, the class with its file and line, and the fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import Command

SETS = """
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

IMAGES = torch.randint(0, 255, (40, 3, 32, 32), dtype=torch.uint8)


class Base(Dataset):
    targets = [index % 3 for index in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return IMAGES[index], index % 3


class Number(Base):
    classes = 3


class NumpyNumber(Base):
    classes = np.int64(3)


class TorchNumber(Base):
    classes = torch.tensor(3)


class NoNumber(Base):
    classes = None


class Fraction(Base):
    classes = 2.5


class Zero(Base):
    classes = 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(IMAGES[0], 0)])


class StreamWithLength(Stream):
    def __len__(self):
        return 40


class Abstract(Dataset):
    def __len__(self):
        return 40


class FloatLength(Base):
    def __len__(self):
        return 40 / 2


class FaultyLength(Base):
    def __len__(self):
        return len(self.files)


class NoLength(Dataset):
    def __getitem__(self, index):
        return IMAGES[index], index % 3


def mapping():
    return {index: (IMAGES[index], index % 3) for index in range(40)}


def listed():
    return list(mapping().values())
"""
QUICK = ("data=mine", "epochs=1", "memory_format=contiguous", "progress=off")
WAYS = {
    "held": ("data.cache=auto",),
    "streamed": ("data.cache=none",),
    "workers": ("data.cache=none", "data.num_workers=2"),
}


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A folder with the data sets above."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(
        'set: Base\ntrain: {_target_: "sets.${data.set}"}\nclasses: 3\n'
    )
    (tmp_path / "sets.py").write_text(SETS)
    return tmp_path


def place(sets: Path, name: str, method: str = "") -> str:
    """Return the class of a message: its name, file and line, or the line of a method."""
    lines = (sets / "sets.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if re.match(rf"class {name}\b", text))
    if method:
        line = next(number for number, text in enumerate(lines, 1) if number > line and f"def {method}(" in text)
    return f"({sets / 'sets.py'}, line {line})"


@pytest.mark.parametrize("name", ["Number", "NumpyNumber", "TorchNumber", "NoNumber"])
@pytest.mark.usefixtures("sets")
def test_the_attribute_classes_may_be_a_number(name: str, forked: Command) -> None:
    done = forked(*QUICK, f"data.set={name}", "data.classes=null", "limit_batches=1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "found"), [("Fraction", "2.5"), ("Zero", "0")])
def test_an_attribute_classes_that_is_not_a_number_is_a_config_error(
    name: str, found: str, sets: Path, forked: Command
) -> None:
    done = forked(*QUICK, f"data.set={name}", "data.classes=null")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: data.train: the attribute `classes` of {name} {place(sets, name)} is {found}, and it must be a list "
        "of names or a number from 1\n  correct the attribute, or write data.classes=NUMBER\n",
    )
    assert forked(*QUICK, f"data.set={name}", "limit_batches=1").returncode == 0  # the config gives data.classes=3


@pytest.mark.parametrize("name", ["Stream", "StreamWithLength", "Abstract"])
def test_a_data_set_without_items_is_a_config_error(name: str, sets: Path, forked: Command) -> None:
    for how in WAYS.values():
        done = forked(*QUICK, f"data.set={name}", *how)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: data.train: {name} {place(sets, name)} has no __getitem__(index)")
        assert ("IterableDataset" in done.stderr) == (name != "Abstract")
        assert "trainkit reads samples by their index" in done.stderr
        assert "return a pair (inputs, target)" in done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FloatLength", "TypeError: 'float' object cannot be interpreted as an integer"),
        ("FaultyLength", "AttributeError: 'FaultyLength' object has no attribute 'files'"),
    ],
)
def test_a_wrong_length_is_a_config_error(name: str, words: str, sets: Path, forked: Command) -> None:
    done = forked(*QUICK, f"data.set={name}")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: data.train: __len__ of {name} {place(sets, name, '__len__')} raises {words}\n"
        "  return the number of samples from __len__, as an int\n",
    )


def test_a_data_set_without_a_length_is_a_config_error(sets: Path, forked: Command) -> None:
    done = forked(*QUICK, "data.set=NoLength")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: data.train: NoLength {place(sets, 'NoLength')} has no __len__, and trainkit needs the number of "
        "samples\n  write __len__, which returns the number of samples\n",
    )


@pytest.mark.parametrize("name", ["mapping", "listed"])
@pytest.mark.usefixtures("sets")
def test_a_list_or_a_dict_of_pairs_is_a_data_set(name: str, forked: Command) -> None:
    done = forked(*QUICK, f"data.set={name}", "limit_batches=1")
    assert done.returncode == 0, done.stderr

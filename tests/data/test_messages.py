"""Errors of a user's data set name the config key, the class with its file and line, and the fix."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Command
from tests.data.test_cache import OPTIONS
from tests.helpers import CPU, ItemDataset
from trainkit.data.cache import make_store
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.split import split
from trainkit.data.store import Store

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
        f"error: data.train: the attribute `classes` of sets.{name} {place(sets, name)} is {found}, and it must be "
        "a list of names or a number from 1\n  correct the attribute, or write data.classes=NUMBER\n",
    )
    assert forked(*QUICK, f"data.set={name}", "limit_batches=1").returncode == 0  # the config gives data.classes=3


def test_a_data_set_without_items_is_a_config_error(sets: Path, forked: Command) -> None:
    for how in WAYS.values():
        done = forked(*QUICK, "data.set=Abstract", *how)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: data.train: sets.Abstract {place(sets, 'Abstract')} has no __getitem__")
        assert "and no __iter__, so no samples can be read" in done.stderr
        assert "returns a pair (inputs, target)" in done.stderr


@pytest.mark.usefixtures("sets")
def test_a_stream_that_cannot_follow_the_keys_is_a_config_error(forked: Command) -> None:
    for how, cause in ((["data.cache=memory"], "is not held in memory"), ([], "so the end of an epoch is unknown")):
        done = forked(*QUICK, "data.set=Stream", "data.split=off", *how)
        assert done.returncode == 2, done.stderr
        assert cause in done.stderr


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
        f"error: data.train: __len__ of sets.{name} {place(sets, name, '__len__')} raises {words}\n"
        "  return the number of samples from __len__, as an int\n",
    )


def test_a_data_set_without_a_length_is_a_config_error(sets: Path, forked: Command) -> None:
    done = forked(*QUICK, "data.set=NoLength")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: data.train: sets.NoLength {place(sets, 'NoLength')} has no __len__, and trainkit needs the number of "
        "samples\n  write __len__, which returns the number of samples\n",
    )


@pytest.mark.parametrize("name", ["mapping", "listed"])
@pytest.mark.usefixtures("sets")
def test_a_list_or_a_dict_of_pairs_is_a_data_set(name: str, forked: Command) -> None:
    done = forked(*QUICK, f"data.set={name}", "limit_batches=1")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- samples


SAMPLES = """

class Ragged(Base):
    def __getitem__(self, index):
        return torch.zeros(3 + index % 5), index % 3


class Triple(Base):
    def __getitem__(self, index):
        return IMAGES[index], 1, 2


class Nothing(Base):
    def __getitem__(self, index):
        pass


class Key(Base):
    def __getitem__(self, index):
        return IMAGES[index], {"a": 1}["b" if index == 7 else "a"]


class TooLong(Base):
    files = list(range(35))

    def __getitem__(self, index):
        return IMAGES[self.files[index]], index % 3


class TooLongArray(Base):
    files = np.arange(35)

    def __getitem__(self, index):
        return IMAGES[self.files[index]], index % 3


class Lost(Base):
    def __getitem__(self, index):
        open(f"lost/{index}.png")


class HeldOut(Base):
    def __getitem__(self, index):
        with open("held_out.txt") as file:
            if index in map(int, file.read().split()):
                raise KeyError(index)
        return super().__getitem__(index)


class Lazy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.LazyLinear(3)

    def forward(self, inputs):
        return self.classifier(inputs.flatten(1))
"""


@pytest.fixture
def samples(sets: Path) -> Path:
    """The folder of `sets`, with the data sets above too, and a lazy model."""
    (sets / "sets.py").write_text(SETS + SAMPLES)
    (sets / "conf" / "model").mkdir()
    (sets / "conf" / "model" / "lazy.yaml").write_text("_target_: sets.Lazy\n")
    return sets


@pytest.mark.parametrize("way", list(WAYS))
def test_samples_of_different_lengths_are_named_with_their_shapes(way: str, samples: Path, forked: Command) -> None:
    done = forked(*QUICK, "data.set=Ragged", *WAYS[way])
    assert done.returncode == 5, done.stderr
    assert re.fullmatch(
        r"error: data\.train: the samples of a batch must have equal shapes, but those of sets\.Ragged "
        + re.escape(place(samples, "Ragged", "__getitem__"))
        + r" differ: sample \d+ is inputs \(\d,\) float32, target int; sample \d+ is inputs \(\d,\) float32, target int"
        r"\n  write data\.collate=pad, pad the samples in the data set, or keep them in a list: data\.collate=lists\n",
        done.stderr,
    )


@pytest.mark.parametrize("model", ["toy_cnn", "lazy"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    ("name", "returned", "more"),
    [
        ("Triple", "a tuple of 3 values", ", or say which positions they are: data.inputs=[0,1] data.targets=2"),
        ("Nothing", "None", ""),
    ],
)
def test_a_sample_that_is_not_a_pair_is_a_config_error(
    name: str, returned: str, more: str, way: str, model: str, samples: Path, forked: Command
) -> None:
    done = forked(*QUICK, f"data.set={name}", f"model={model}", *WAYS[way])
    assert (done.returncode, done.stderr) == (
        2,
        f"error: data.train: __getitem__ of sets.{name} {place(samples, name, '__getitem__')} returns {returned}, and "
        f"a sample must be a pair (inputs, target)\n  write return inputs, target in __getitem__{more}\n",
    )


@pytest.mark.parametrize("way", list(WAYS))
def test_an_error_in_getitem_names_its_line_and_the_sample(way: str, samples: Path, forked: Command) -> None:
    (line,) = (number for number, text in enumerate((SETS + SAMPLES).splitlines(), 1) if '"b" if' in text)
    done = forked(*QUICK, "data.set=Key", *WAYS[way])
    assert (done.returncode, done.stderr) == (
        2,
        "error: data.train: KeyError: 'b'\n"
        "  raised while sample 7 of 40 was read\n"
        f"  {samples / 'sets.py'}, line {line}, in __getitem__: "
        'return IMAGES[index], {"a": 1}["b" if index == 7 else "a"]\n'
        "  fix that code, or change data.train; TRAINKIT_TRACEBACK=1 shows the whole traceback\n",
    )


@pytest.mark.parametrize("way", ["streamed", "workers"])
def test_an_error_in_a_validation_sample_names_the_set_that_holds_the_sample(
    way: str, samples: Path, forked: Command
) -> None:
    dataset = ItemDataset(lambda index: (index, index), count=40)
    dataset.targets = [index % 3 for index in range(40)]  # type: ignore[attr-defined]
    held_out = split(Store.of(dataset), 0.25)[1].dataset.indices
    (samples / "held_out.txt").write_text(" ".join(map(str, held_out)))
    done = forked(*QUICK, "data.set=HeldOut", "data.split=0.25", *WAYS[way])
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(
        f"error: data.train: KeyError: {held_out[0]}\n  raised while sample {held_out[0]} of 40 was read"
    )
    (samples / "held_out.txt").write_text("3")
    done = forked(*QUICK, "data.set=Base", "data.val={_target_: sets.HeldOut}", *WAYS[way])
    assert done.stderr.startswith("error: data.val: KeyError: 3\n  raised while sample 3 of 40 was read")


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", ["TooLong", "TooLongArray"])
def test_a_length_beyond_the_last_sample_is_named(name: str, way: str, samples: Path, forked: Command) -> None:
    done = forked(*QUICK, f"data.set={name}", *WAYS[way])
    assert done.returncode == 2, done.stderr
    first, second, third, hint = done.stderr.splitlines()
    assert first.startswith("error: data.train: IndexError: ")
    assert re.fullmatch(r"  raised while sample \d+ of 40 was read; 40 is the length that __len__ returns", second)
    assert third.startswith(f"  {samples / 'sets.py'}, line ")
    assert hint.startswith("  fix that code, or change data.train")


@pytest.mark.parametrize("way", list(WAYS))
def test_a_missing_file_is_a_data_error_that_names_the_class(way: str, samples: Path, forked: Command) -> None:
    done = forked(*QUICK, "data.set=Lost", *WAYS[way])
    assert done.returncode == 5, done.stderr
    assert re.fullmatch(
        r"error: data\.train: sample \d+: FileNotFoundError: \[Errno 2\] No such file or directory: 'lost/\d+\.png' "
        + re.escape(f"in __getitem__ of sets.Lost {place(samples, 'Lost', '__getitem__')}")
        + r"\n  repair or delete it, or skip such samples: data\.on_unreadable=skip\n",
        done.stderr,
    )


# -------------------------------------------------------------------------------------------- data=arrays


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "x.csv",
            [
                'numpy.genfromtxt("x.csv", delimiter=",", skip_header=1)',
                'savez("x.npz", X=table[:, :-1], y=table[:, -1])',
            ],
        ),
        ("x.npy", ['numpy.savez("x.npz", X=numpy.load("x.npy"), y=targets)']),
        ("x.pt", ['torch.load("x.pt")', 'numpy.savez("x.npz", X=']),
        ("x.parquet", ['pandas.read_parquet("x.parquet")', 'savez("x.npz", X=table[:, :-1], y=table[:, -1])']),
        ("x.dat", ['numpy.savez("x.npz", X=inputs, y=targets)']),
    ],
)
def test_another_file_than_npz_gives_the_lines_that_convert_it(
    name: str, lines: list[str], tmp_path: Path, forked: Command
) -> None:
    file = tmp_path / name
    if name == "x.npy":
        np.save(file, np.zeros((4, 2)))
    elif name == "x.pt":
        torch.save({"X": torch.zeros(4, 2)}, file)
    else:
        file.write_bytes(b"a,b,c\n1,2,3\n")
    done = forked("data=arrays", f"data.file={name}", "epochs=1")
    assert done.returncode == 5, done.stderr
    kind = name.removeprefix("x.")
    assert done.stderr.startswith(
        f"error: data.file={name}: data=arrays reads .npz files, and this is a .{kind} file\n"
    )
    assert "pickle" not in done.stderr
    assert all(line in done.stderr for line in lines), done.stderr
    gone = forked("data=arrays", "data.file=gone.csv", "epochs=1")
    assert "error: data.file=gone.csv: [Errno 2] No such file" in gone.stderr


def test_the_lines_that_convert_a_csv_file_work(tmp_path: Path, forked: Command) -> None:
    (tmp_path / "x.csv").write_text("a,b,c\n" + "1,2,3\n" * 20)
    done = forked("data=arrays", "data.file=x.csv", "epochs=1")
    code = "\n".join(line.strip() for line in done.stderr.splitlines() if "numpy." in line)
    subprocess.run([sys.executable, "-c", f"import numpy\n{code}"], cwd=tmp_path, check=True)
    model = ("model=linear", "model.in_features=2", "model.out_features=1", "loss=mse", "monitor.metric=val/loss")
    done = forked("data=arrays", "data.file=x.npz", *model, "epochs=1")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- float64


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_double_inputs_stay_double(cache: str) -> None:
    dataset = ItemDataset(lambda index: (torch.zeros(3, dtype=torch.float64), index))
    store = make_store(dataset, cache, CPU, **OPTIONS)
    for normalize in ((), (torch.tensor(0.5), torch.tensor(0.5))):
        (inputs, _), *_ = make_loader(store, Prepare(CPU, *normalize), batch_size=4, seed=0).batches(0)
        assert inputs.dtype == torch.float64

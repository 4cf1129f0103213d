"""Evaluations of saved runs: the numbers of the history bit for bit, other data, and clear errors."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report, confusion_matrix
from torch import nn

import trainkit
from tests.helpers import thinned
from trainkit.core.errors import CheckpointError, ConfigError, TrainkitError, UserCodeError
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.checkpoint_files import DamagedError
from trainkit.runs.directory import Run

MODULE = '''
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x)[:, 0]

class Named(TensorDataset):
    """Three classes, one cluster each."""
    classes = ["cat", "dog", "emu"]

    def __init__(self, size=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 3, (size,), generator=generator)
        super().__init__(torch.randn(size, 4, generator=generator) + targets[:, None], targets)

class Loaded(Named):
    """Needs a file."""

    def __init__(self, file):
        open(file).close()
        super().__init__(seed=4)

class Unseeded(TensorDataset):
    """Draws its samples from the global generator, so the samples depend on the data sets built before."""
    classes = 3

    def __init__(self, size):
        super().__init__(torch.randn(size, 4), torch.randint(0, 3, (size,)))

class Binary(TensorDataset):
    def __init__(self, size=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 2, (size,), generator=generator).float()
        super().__init__(torch.randn(size, 4, generator=generator) + targets[:, None], targets)

class Stream(IterableDataset):
    classes = 3

    def __init__(self, size=40, seed=0):
        self.set = Named(size, seed)

    def __iter__(self):
        yield from zip(*self.set.tensors)

class Gaps(Dataset):
    """The samples of Named; one cannot be read."""
    classes = Named.classes

    def __init__(self, size=64, lost=3):
        self.set, self.lost = Named(size), lost

    def __len__(self):
        return len(self.set)

    def __getitem__(self, index):
        if index == self.lost:
            raise OSError("truncated")
        inputs, target = self.set[index]
        return inputs, int(target)

def step(model, inputs, targets, loss_fn):
    outputs = model(inputs)
    return {"loss": loss_fn(outputs, targets), "outputs": outputs, "entropy": -(outputs.softmax(1) ** 2).mean()}

def without_outputs(model, inputs, targets, loss_fn):
    return {"loss": loss_fn(model(inputs), targets), "denominator": len(inputs)}

def warm(model, inputs, targets, loss_fn, progress):
    """A loss that depends on the counts of the training."""
    counts = progress.epoch + 10 * progress.step + 1000 * progress.batch + 100000 * progress.batches
    return {"loss": loss_fn(model(inputs), targets) + counts}
'''
OWN = ["data.train._target_=own.Named", "data.split=0.25", "model._target_=own.Normed"]
BASE = ["epochs=3", "batch_size=16", "progress=off", "report=off", "checkpoint.keep=9"]
SMALL = ["model=mlp", "data=synthetic", "lr=0.1"]
TABLE = ["data=table", "data.file=rows.csv", "data.target=kind"]
CASES: dict[str, list[str]] = {
    "digits": ["data=digits", "model=toy_cnn", "limit_batches=6", "limit_val_batches=off"],
    "ema": ["ema=0.8", *OWN],
    "bf16": ["precision=bf16", "data=digits", "model=toy_cnn", "limit_batches=4"],
    "class weights": ["+loss.weight=[1,5,2]", *OWN],
    "batch norm": OWN,
    "val_batch_size": ["val_batch_size=5", *OWN],
    "split": [*OWN, "data.split=0.6"],
    "folds": ["data.folds=4", "data.fold=2", "data.split=off"],
    "limit_val_batches": ["limit_val_batches=2", *OWN],
    "standardize": TABLE,
    "standardize, own file": [*TABLE, "data.val_file=test.csv"],
    "text": ["data=text", "model=gpt", "model.width=16", "model.heads=2", "model.depth=1", "limit_batches=2"],
    "carried": ["experiment=word_lstm", "limit_batches=2", "model.hidden=8", "model.embedding=8"],
    "own validation set": [*OWN, "data.val={_target_: own.Named, seed: 5}", "data.split=off"],
    "step": [*OWN, "evaluation_step=own.step"],
    "step with metrics": [*OWN, "evaluation_step=own.step", "metrics=classification"],
    "step without outputs": [*OWN, "evaluation_step=own.without_outputs"],
    "step with progress": [*OWN, "evaluation_step=own.warm", "data.val={_target_: own.Named, seed: 5}"],
    "shared step": [*OWN, "training_step=own.step", "evaluation_step='${training_step}'"],
    "metrics": [*OWN, "metrics=classification"],
    "micro_batch": [*OWN, "micro_batch=3", "model={_target_: torch.nn.Linear, in_features: 4, out_features: 3}"],
    "random sets": [
        *("model._target_=own.Normed", "data.train={_target_: own.Unseeded, size: 48}"),
        *("data.val={_target_: own.Unseeded, size: 40}", "data.split=off"),
    ],
    "streamed": [*OWN, "data.cache=none"],
    "unreadable": [*OWN, "data.train._target_=own.Gaps", "data.on_unreadable=skip", "data.split=0.5"],
    "stream": [*OWN, "data.val={_target_: own.Stream}", "data.split=off"],
    "regression": ["experiment=table_regression"],
    "single logit": ["data.train._target_=own.Binary", "data.split=0.3", "model._target_=own.Single", "loss=bce"],
    "segmentation": ["experiment=segmentation", "limit_batches=1", "data.train.size=40", "data.train.pixels=16"],
    "autoencoder": ["experiment=vae", "limit_batches=2"],
    "steps": [*OWN, "epochs=off", "steps=7", "steps_per_epoch=3"],
    "trainable": [*OWN, "checkpoint.weights=trainable", "+param_groups.body={name: '0\\..*', freeze: true}"],
    "monitor of a metric": [*OWN, "metrics=classification", "monitor.metric=val/f1"],
}  # fmt: skip


@pytest.fixture
def own(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `own` and two tables."""
    (here / "own.py").write_text(MODULE)
    generator = np.random.default_rng(0)
    for name, count in (("rows", 60), ("test", 23)):
        kinds = [*"abc", *generator.choice(list("abc"), count - 3)]
        rows = [f"{ord(kind) * generator.normal(1, 0.1)},{generator.choice(['x', 'y'])},{kind}" for kind in kinds]
        (here / f"{name}.csv").write_text("\n".join(["size,word,kind", *rows, ""]))
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)
    return here


def _is_experiment(overrides: Sequence[str]) -> bool:
    return any(text.startswith("experiment=") for text in overrides)


def train(directory: Path, *overrides: str) -> Run:
    """Train a config; keep all checkpoints."""
    return trainkit.train(
        trainkit.compose([*BASE, *([] if _is_experiment(overrides) else SMALL), *overrides]), directory=directory
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return metrics as the history stores them."""
    found: dict[str, Any] = json.loads(json.dumps(values).replace("NaN", "null"))
    return found


@pytest.mark.parametrize("case", thinned(CASES, 3))
def test_the_numbers_are_those_of_the_history_bit_for_bit(case: str, own: Path) -> None:
    run = train(own / "run", *CASES[case])
    assert run.history
    for row in run.history:
        result = trainkit.evaluate(run, f"step-{row['step']}")
        assert plain(result["metrics"]) == {key: value for key, value in row.items() if key.startswith("val/")}
        assert result["epoch"] == row["epoch"]
        assert result["history"] == {"epoch": row["epoch"], "equal": True, "differences": {}}
    assert not [note for note in result["notes"] if "data is not that" in note]


@pytest.fixture
def run(own: Path) -> Run:
    """A small run on the data set `Named`, with batch norm and an average of the weights."""
    return train(own / "run", *OWN, "ema=0.5", "epochs=2")


def all_outputs(run: Run, checkpoint: str, dataset: Any) -> torch.Tensor:
    """Return the outputs of the run's model for a whole data set, computed by hand."""
    with torch.no_grad():
        outputs: torch.Tensor = trainkit.load(run, checkpoint)(dataset.tensors[0])
    return outputs


def test_other_data_is_evaluated_as_by_hand(run: Run) -> None:
    dataset = importlib.import_module("own").Named(size=50, seed=7)
    outputs, targets = all_outputs(run, "last", dataset), dataset.tensors[1]
    for overrides in (
        ["data.val._target_=own.Named", "data.val.size=50", "data.val.seed=7"],
        ["data.val={_target_: own.Named, size: 50, seed: 7}"],
    ):
        result = trainkit.evaluate(run, "last", [*overrides, "val_batch_size=50"])
        assert result["samples"] == 50
        assert result["metrics"]["val/loss"] == nn.functional.cross_entropy(outputs, targets).item()
        assert result["metrics"]["val/accuracy"] == (outputs.argmax(1) == targets).double().mean().item()
        assert result["history"] is None


def test_an_unused_split_gives_a_note(own: Path) -> None:
    given = train(own / "given", *OWN, "data.val={_target_: own.Named, seed: 5}", "data.split=off")
    notes = trainkit.evaluate(given, "last", ["data.split=0.5"])["notes"]
    assert [note for note in notes if "nothing is split off" in note]
    held_out = train(own / "held_out", *OWN, "data.split=0.5")
    notes = trainkit.evaluate(held_out, "last", ["data.split=0.4"])["notes"]
    assert not [note for note in notes if "nothing is split off" in note]


def test_the_table_of_classes_is_that_of_scikit_learn(run: Run) -> None:
    dataset = importlib.import_module("own").Named(size=50, seed=7)
    predicted, true = all_outputs(run, "best", dataset).argmax(1), dataset.tensors[1]
    result = trainkit.evaluate(run, overrides=["data.val={_target_: own.Named, size: 50, seed: 7}"])
    report = classification_report(true, predicted, target_names=dataset.classes, output_dict=True, zero_division=0)
    assert [row["class"] for row in result["classes"]] == dataset.classes
    for index, row in enumerate(result["classes"]):
        expected = report[row["class"]]
        assert row["samples"] == expected["support"]
        assert [row[key] for key in ("precision", "recall")] == [expected[key] for key in ("precision", "recall")]
        assert row["f1"] == pytest.approx(expected["f1-score"], abs=1e-15)
        assert row["accuracy"] == ((predicted == index) == (true == index)).double().mean().item()
    for average in ("macro", "weighted"):
        expected = report[f"{average} avg"]
        found = [result[average][key] for key in ("precision", "recall", "f1")]
        assert found == pytest.approx([expected[key] for key in ("precision", "recall", "f1-score")], abs=1e-15)
    assert result["confusion_matrix"] == confusion_matrix(true, predicted, labels=range(3)).tolist()


def test_the_averaged_weights_are_evaluated(run: Run) -> None:
    result = trainkit.evaluate(run)
    assert result["ema"]
    name = Checkpoints(run.directory / "checkpoints").read_pointer("best")
    saved = Checkpoints(run.directory / "checkpoints").load(str(name))
    assert not torch.equal(saved["model"]["0.weight"], saved["ema"]["module.model.0.weight"])


def test_another_batch_size_changes_only_the_rounding(run: Run) -> None:
    whole, single = (trainkit.evaluate(run, overrides=[f"val_batch_size={n}"])["metrics"] for n in (64, 1))
    assert whole["val/loss"] == pytest.approx(single["val/loss"], rel=1e-6)
    assert whole["val/accuracy"] == single["val/accuracy"]


def test_metrics_are_added_and_change_no_other_number(run: Run) -> None:
    before = trainkit.evaluate(run)
    for overrides in (["metrics=classification"], ["metrics.f1._target_=trainkit.metrics.F1"]):
        result = trainkit.evaluate(run, overrides=overrides)
        assert before["metrics"].items() <= result["metrics"].items()
        assert result["metrics"]["val/f1"] == pytest.approx(result["macro"]["f1"], abs=1e-15)
        assert result["history"] == before["history"]


def test_an_evaluation_changes_neither_the_run_nor_the_rng(run: Run) -> None:
    files = {file: file.read_bytes() for file in run.directory.rglob("*") if file.is_file()}
    before = torch.get_rng_state()
    trainkit.evaluate(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert {file: file.read_bytes() for file in run.directory.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.depth=3", "keeps the model of the run"),
        ("model=mlp", "keeps the model of the run"),
        ("~model.depth", "keeps the model of the run"),
        ("loss=mse", "keeps the loss of the run"),
        ("lr=0.5", "does not change an evaluation"),
        ("epochs=9", "does not change an evaluation"),
        ("batch_size=9", "write val_batch_size=N"),
        ("limit_batches=2", "write limit_val_batches=N"),
        ("data.classes=5", "decides the number of classes"),
        ("data=digit", "did you mean data=digits"),
        ("data.nosuch=1", "data.nosuch"),
        ("data.split=7", "data.split"),
        ("data.split=off", "there is no validation data"),
        ("evaluation_step=off", "add evaluation_step=supervised"),
        ("data.val._target_=own.Nameed", "own.Named"),
        ("nonsense", "neither the directory of a run nor KEY=VALUE"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(override: str, words: str, run: Run) -> None:
    with pytest.raises(ConfigError) as error:
        trainkit.evaluate(run, overrides=[override])
    assert words in str(error.value)


def test_an_override_cannot_change_the_model_by_an_interpolation(own: Path) -> None:
    run = train(own / "run", "+data.width=8", "model.hidden=['${data.width}']", "epochs=1")
    with pytest.raises(ConfigError, match="change the model of the run"):
        trainkit.evaluate(run, overrides=["data.width=9"])


def test_a_choice_of_data_keeps_what_belongs_to_the_model(own: Path) -> None:
    normalize = "data.normalize={mean: 0.4, std: 0.3}"
    run = train(own / "run", "data=digits", "model=toy_cnn", normalize, "limit_batches=3", "epochs=1")
    other = trainkit.evaluate(run, overrides=["data=synthetic", "limit_val_batches=off"])
    session = train(own / "other", "data=synthetic", "model=toy_cnn", normalize, "epochs=1", "lr=0", "init_from=run")
    assert other["metrics"]["val/loss"] == session.history[-1]["val/loss"]


def test_other_rows_are_standardized_by_the_training_rows_of_the_run(own: Path) -> None:
    run = train(own / "run", *TABLE, "data.val_file=test.csv", "epochs=1")
    (own / "again.csv").write_text((own / "test.csv").read_text())
    again = ["data.val_file=again.csv"]
    expected = run.history[-1]["val/loss"]
    assert trainkit.evaluate(run, overrides=again)["metrics"]["val/loss"] == expected
    (run.directory / "preprocessing.json").unlink()  # as in a run of an earlier version
    assert trainkit.evaluate(run, overrides=again)["metrics"]["val/loss"] == expected


def test_a_table_with_another_mean_is_refused(own: Path) -> None:
    run = train(own / "run", *TABLE, "data.fill=mean", "epochs=1")
    lines = (own / "rows.csv").read_text().splitlines()
    (own / "other.csv").write_text("\n".join(lines[: len(lines) // 2]))
    with pytest.raises(ConfigError, match=r"encodes the column '\w+' differently"):
        trainkit.evaluate(run, overrides=["data.file=other.csv"])


def test_a_table_with_another_encoding_is_refused(own: Path) -> None:
    run = train(own / "run", *TABLE, "epochs=1")
    (own / "other.csv").write_text((own / "rows.csv").read_text().replace(",x,", ",z,"))
    with pytest.raises(ConfigError, match="encodes the column 'word' differently"):
        trainkit.evaluate(run, overrides=["data.file=other.csv"])


def test_a_table_with_a_word_in_a_column_of_numbers_is_refused(own: Path) -> None:
    run = train(own / "run", *TABLE, "epochs=1")
    header, first, *rows = (own / "rows.csv").read_text().splitlines()
    numbers = [index for index, cell in enumerate(first.split(",")) if cell.replace(".", "").lstrip("-").isdigit()]
    cells = first.split(",")
    cells[numbers[0]] = "unknown"
    (own / "other.csv").write_text("\n".join([header, ",".join(cells), *rows]))
    with pytest.raises(ConfigError, match=f"encodes the column '{header.split(',')[numbers[0]]}' differently"):
        trainkit.evaluate(run, overrides=["data.file=other.csv"])


def test_classes_in_another_order_are_refused(run: Run, own: Path) -> None:
    with (own / "own.py").open("a") as file:
        file.write("\nclass Swapped(Named):\n    classes = ['dog', 'cat', 'emu']\n")
        file.write("\nclass Renamed(Named):\n    classes = ['Cat', 'Dog', 'Emu']\n")
        file.write("\nclass Shifted(Named):\n    classes = ['ant', 'cat', 'dog']\n")
    importlib.reload(importlib.import_module("own"))
    with pytest.raises(ConfigError, match="classes of the data are dog, cat, emu"):
        trainkit.evaluate(run, overrides=["data.val._target_=own.Swapped"])
    with pytest.raises(ConfigError, match="class 'cat' has the number 1, and 0 in the run"):
        trainkit.evaluate(run, overrides=["data.val._target_=own.Shifted"])
    result = trainkit.evaluate(run, overrides=["data.val._target_=own.Renamed"])
    assert any("Cat, Dog, Emu" in note for note in result["notes"])
    assert [row["class"] for row in result["classes"]] == ["cat", "dog", "emu"]


def test_a_run_without_validation_can_be_evaluated_on_its_training_data(own: Path) -> None:
    run = train(own / "run", *OWN, "data.split=off", "epochs=1")
    with pytest.raises(ConfigError, match=r"data\.val=\$\{data\.train\}"):
        trainkit.evaluate(run)
    assert trainkit.evaluate(run, overrides=["data.val=${data.train}"])["samples"] == 64


def test_the_training_data_may_be_gone_if_there_is_a_validation_set(own: Path) -> None:
    own_sets = ["data.train={_target_: own.Loaded, file: rows.csv}", "data.val={_target_: own.Named}", "data.split=off"]
    run = train(own / "run", "model._target_=own.Normed", *own_sets, "epochs=1")
    (own / "rows.csv").unlink()
    assert trainkit.evaluate(run)["history"]["equal"]


def test_data_that_is_gone_is_an_error_with_its_name(own: Path) -> None:
    run = train(own / "run", *TABLE, "epochs=1")
    (own / "rows.csv").unlink()
    with pytest.raises(TrainkitError, match=r"rows\.csv"):
        trainkit.evaluate(run)


def test_changed_data_is_noted_and_compared_with_the_history(own: Path) -> None:
    run = train(own / "run", *TABLE, "data.val_file=test.csv", "epochs=1")
    rows = (own / "test.csv").read_text().splitlines()
    (own / "test.csv").write_text("\n".join([*rows[:10], ""]))
    result = trainkit.evaluate(run)
    assert any("validation samples: 23 then, 9 now" in note for note in result["notes"])
    assert not result["history"]["equal"]
    assert result["history"]["differences"]["val/loss"][0] == run.history[-1]["val/loss"]


def test_a_killed_run_is_evaluated_at_its_last_checkpoint(own: Path) -> None:
    run = train(own / "run", *OWN, "checkpoint.every_steps=1", "epochs=2")
    for name in ("run.json", "history.jsonl"):
        (run.directory / name).unlink()
    saved = Checkpoints(run.directory / "checkpoints")
    result = trainkit.evaluate(run.directory, "last")
    assert result["checkpoint"] == saved.read_pointer("last")
    assert result["history"] is None
    inside = trainkit.evaluate(run.directory, "step-2")  # within an epoch
    assert (inside["step"], inside["epoch"]) == (2, 0)


def test_damaged_and_missing_checkpoints_are_refused(run: Run) -> None:
    folder = run.directory / "checkpoints"
    with pytest.raises(CheckpointError, match="no step-77 checkpoint") as error:
        trainkit.evaluate(run, "step-77")
    assert error.value.problems[0].hint.startswith("it has step-")
    name = Checkpoints(folder).read_pointer("best")
    state = folder / str(name) / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        trainkit.evaluate(run)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        trainkit.evaluate(run)


def test_a_checkpoint_of_another_model_is_refused(run: Run, own: Path) -> None:
    (own / "own.py").write_text(MODULE.replace("nn.Linear(4, 8), nn.BatchNorm1d(8)", "nn.Linear(4, 8)"))
    importlib.reload(importlib.import_module("own"))
    with pytest.raises(CheckpointError, match="does not fit"):
        trainkit.evaluate(run)


def test_a_model_that_does_not_take_the_other_data_is_a_config_error(run: Run) -> None:
    with pytest.raises(UserCodeError, match="shapes cannot be multiplied") as error:
        trainkit.evaluate(run, overrides=["data=digits"])
    assert error.value.exit_code == 2


def test_segmentation_has_no_table_of_classes(own: Path) -> None:
    run = train(own / "run", *CASES["segmentation"], "epochs=1")
    result = trainkit.evaluate(run)
    assert result["classes"] is None
    assert "val/mean_iou" in result["metrics"]


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = Checkpoints.load, []

    def fail_once(self: Checkpoints, name: str) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise DamagedError("state.pt cannot be read: No such file or directory")
        return load(self, name)

    monkeypatch.setattr(Checkpoints, "load", fail_once)
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainkit.evaluate(run)
    calls.clear()
    (run.directory / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert trainkit.evaluate(run)["history"]["equal"]
    assert len(calls) == 2

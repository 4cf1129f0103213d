"""Predict: the outputs of a trained model for files, without the training data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.build.form import build_form
from trainkit.build.model import build_loss
from trainkit.config.settings import Settings
from trainkit.core.device import autocast, is_out_of_memory, select_device
from trainkit.core.errors import ConfigError, DataError, OutOfMemoryError, TrainkitError, UserCodeError
from trainkit.core.paths import check_exist
from trainkit.core.pytree import describe, map_tensors, structure_of
from trainkit.data.collate import list_as_tensors, stack
from trainkit.data.file_search import find_files
from trainkit.data.raw_files import STDIN, LineReader, RawSample, read_samples
from trainkit.data.reading import is_file_error
from trainkit.display.rows import place_text
from trainkit.engine.load import LoadedModel, load_checkpoint
from trainkit.engine.predict_text import predict_lines
from trainkit.engine.prediction_rows import RowFormat, Scores, scores_of
from trainkit.engine.preprocessing import preprocessing_of_run, restore_prepare
from trainkit.engine.readers import choose_reader
from trainkit.losses import FromModel
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.preprocessing import Preprocessing
from trainkit.training.call import describe_call, install_call
from trainkit.training.carried import carrying_modules, reset_carried
from trainkit.training.metric_set import detach

Row = dict[str, Any]


def predict(
    run: Run | Path | str,
    files: Iterable[Path | str],
    *,
    checkpoint: str = "best",
    overrides: Sequence[str] = (),
    batch_size: int | None = None,
    top: int = 1,
    probabilities: bool = False,
    flip: bool = False,
    on_unreadable: Callable[[Mapping[str, Any], str], object] | None = None,
    on_note: Callable[[str], object] | None = None,
) -> Iterator[Row]:
    """Return an iterator over the predictions for files, one row for each sample, in order.

    A row has the place of the sample (`file`, and `row` of a table or `line` of a text), and for classes `class` and
    `probability`, for a regression the predicted numbers by the names of the targets, for other outputs `outputs`.

    Args:
        run: a run, its directory, or `last` for the newest run.
        files: files and folders. A folder stands for the files in it and in its subfolders, in natural order.
        checkpoint: `best`, `last`, or `step-N`.
        overrides: config values for this machine: `["device=cpu"]`.
        batch_size: the number of samples in a batch; None: `val_batch_size` of the run.
        top: the number of classes in a row; from the second on they are `class_2`, `probability_2`, ...
        probabilities: add the probability of each class, as a mapping.
        flip: average the probabilities of an image and its mirror image.
        on_unreadable: is called with the place of a sample that cannot be read, and the reason. None: that is an error.
        on_note: is called with notes for the user.

    Raises:
        ConfigError: an argument is wrong, or the run does not say how a file becomes a sample.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: a file is missing or cannot be read.
    """
    names = [str(file) for file in files]
    check_exist(name for name in names if name != STDIN)
    run = run if isinstance(run, Run) else Run.load(find_run(str(run)))
    loaded = load_checkpoint(run, checkpoint, overrides)
    preprocessing = preprocessing_of_run(run, loaded.settings)
    reader = choose_reader(loaded.settings, preprocessing, names)
    found = find_files(names, reader)
    predictor = Predictor(loaded, preprocessing, flip=flip)
    samples = _readable(read_samples(found, reader, is_file_error), on_unreadable)
    size = batch_size or loaded.settings.val_batch_size
    classes = _unique(preprocessing.classes)
    if isinstance(reader, LineReader):
        batches = predict_lines(predictor.forward, samples, size, predictor.length, classes, top)
    else:
        targets = (preprocessing.reader or {}).get("targets")
        rows = RowFormat(classes, targets if isinstance(targets, list) else None, top, probabilities)
        batches = _batches_of_rows(rows, predictor, _batches(samples, size), reader.notes)
    return _with_notes(batches, reader.notes, on_note or (lambda _: None))


def _batches_of_rows(
    rows: RowFormat, predictor: Predictor, batches: Iterable[list[RawSample]], notes: list[str]
) -> Iterator[list[Row]]:
    """Yield the rows of each batch. Add a note if an option for classes has no effect."""
    for number, batch in enumerate(batches):
        scores = predictor.scores(batch)
        if number == 0 and (rows.top > 1 or rows.all_probabilities) and scores.kind not in ("classes", "labels"):
            notes.append("note: --top and --probabilities have no effect, because this run does not predict classes")
        yield rows.rows([sample.place for sample in batch], scores)


def _with_notes(batches: Iterable[list[Row]], notes: list[str], on_note: Callable[[str], object]) -> Iterator[Row]:
    """Yield the rows of the batches. Pass on the notes, which the reader adds as it reads."""
    passed = 0
    for batch in itertools.chain([[]], batches, [[]]):
        for note in notes[passed:]:
            passed += 1
            on_note(note)
        yield from batch


def _unique(names: list[str] | None) -> list[str] | None:
    """Return the names of the classes; None, so that numbers are shown, if several classes have the same name."""
    return names if names is None or len(set(names)) == len(names) else None


def _readable(
    samples: Iterable[RawSample], on_unreadable: Callable[[Mapping[str, Any], str], object] | None
) -> Iterator[RawSample]:
    """Yield the samples that could be read; report the others."""
    for sample in samples:
        if not sample.error:
            yield sample
        elif on_unreadable is None:
            raise DataError(f"{place_text(sample.place)}: {sample.error}", hint="correct or remove it")
        else:
            on_unreadable(sample.place, sample.error)


def _batches(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    """Yield batches of at most `size` samples; samples of different structures are not in the same batch."""
    batch: list[RawSample] = []
    structure = None
    for sample in samples:
        found = structure_of(sample.inputs)
        if batch and (len(batch) == size or found != structure):
            yield batch
            batch = []
        structure = found
        batch.append(sample)
    if batch:
        yield batch


class Predictor:
    """Calls a trained model with raw samples, prepared as the training prepares them.

    Args:
        loaded: the model; it is moved to its device.
        preprocessing: of the run.
        flip: average over an image and its mirror image.
    """

    def __init__(self, loaded: LoadedModel, preprocessing: Preprocessing, *, flip: bool = False) -> None:
        settings = loaded.settings
        self.settings, self.flip = settings, flip
        self.device = select_device(settings.device)
        self.autocast = autocast(settings.precision, self.device)
        self.model = loaded.model.to(self.device)
        self.prepare = restore_prepare(preprocessing, self.device)
        if _memory_format(settings, loaded.machine, self.device) == "channels_last":
            self.prepare.memory_format = torch.channels_last
            if self.device.type != "cpu":
                self.model.to(memory_format=torch.channels_last)
        self.loss_fn = build_loss(settings.loss).to(self.device).eval()
        if isinstance(self.loss_fn, FromModel):
            self.loss_fn.bind(self.model)
        self.form = build_form(settings)
        length = (preprocessing.reader or {}).get("length")
        self.length = length if type(length) is int and length > 0 else 64
        self.carrying = carrying_modules(self.model)
        self._called = False

    def scores(self, batch: Sequence[RawSample]) -> Scores:
        """Return the scores of a batch of samples."""
        inputs = self._collate([sample.inputs for sample in batch])
        scores = scores_of(self.loss_fn, self.forward(inputs), self.settings.data.classes)
        if not self.flip:
            return scores
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or scores.kind == "other":
            what = "inputs" if not isinstance(inputs, Tensor) or inputs.dim() != 4 else "outputs"
            raise ConfigError(f"--flip: the {what} of this model are not images with classes", hint="remove --flip")
        mirrored = scores_of(self.loss_fn, self.forward(inputs.flip(-1)), self.settings.data.classes)
        return scores.averaged(mirrored)

    def _collate(self, samples: list[Any]) -> Any:
        if self.form.collate is None:
            return stack(list_as_tensors(samples))
        try:
            return self.form.pair_of_batch(self.form.collate([(s, 0) for s in samples]), None, len(samples))[0]
        except Exception as error:
            raise UserCodeError("data.collate", error) from error

    @torch.no_grad()
    def forward(self, inputs: Any) -> Any:
        """Return the outputs of the model for a batch of inputs on the CPU.

        Raises:
            OutOfMemoryError: the device has too little memory for the batch.
            UserCodeError: the model raised another error.
        """
        inputs, _ = self.prepare(map_tensors(inputs, torch.clone), ())
        if not self._called:
            install_call(self.model, inputs)
            self._called = True
        reset_carried(self.carrying)
        try:
            with self.autocast:
                return detach(self.model(inputs))
        except TrainkitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                cause = f"{self.device} ran out of memory: inputs {describe(inputs)}"
                raise OutOfMemoryError(cause, hint="write a smaller --batch-size") from error
            raise UserCodeError("model", error, exit_code=1, details=describe_call(self.model, inputs)) from error


def _memory_format(settings: Settings, machine: Mapping[str, Any], device: torch.device) -> str:
    """Return the memory format of the settings; for `auto`, that of the training on the same kind of device."""
    if settings.memory_format != "auto":
        return settings.memory_format
    return str(machine.get("memory_format")) if machine.get("device") == device.type else "contiguous"

"""Build what an evaluation needs: the validation data, the model, the loss and the metrics of a saved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainkit.build.data import (
    build_dataset,
    build_loader,
    build_loaders,
    build_stores,
    describe_samples,
    empty_error,
    store_samples,
)
from trainkit.build.form import build_form
from trainkit.build.metrics import build_metrics
from trainkit.build.modules import Initialize, build_modules, memory_errors, prepare_process
from trainkit.build.session import build_state
from trainkit.build.steps import build_step, refuse_generator
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError
from trainkit.core.rng import seed_all
from trainkit.data.cache import OnProgress
from trainkit.data.loaders import Loader
from trainkit.data.pairs import Pair
from trainkit.data.streams import is_stream
from trainkit.training.compile import compile_model
from trainkit.training.state import State

CheckDataset = Callable[[Any], list[str]]


@dataclass(frozen=True)
class TrainingFacts:
    """What a run recorded about its training data, so that an evaluation need not build it.

    Attributes:
        classes: the number of classes; None: the data has none.
        standardize: mean and standard deviation of each input, (F,) float64; None: `data.standardize` is off.
    """

    classes: int | None
    standardize: Pair | None = None


@dataclass
class EvaluationSession:
    """The objects of an evaluation. It has the attributes of a `Session` that explain an error.

    Attributes:
        settings: including the values that depend on the data.
        train: the loader of the training data; None: it was not built.
        held_out: whether the validation samples were split off the training data.
        notes: what was decided for settings such as `auto`.
    """

    settings: Settings
    state: State
    train: Loader | None
    val: Loader
    held_out: bool
    notes: list[str]
    hooks: Mapping[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """End the processes that read data."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def build_evaluation(
    settings: Settings,
    facts: TrainingFacts | None,
    on_progress: OnProgress | None = None,
    initialize: Initialize | None = None,
    check_dataset: CheckDataset | None = None,
) -> EvaluationSession:
    """Build the validation data and the objects that evaluate it, as a training does.

    Args:
        settings: of the run, without the parts that only a training needs.
        facts: about the training data; None: build the training data, as a training does.
        on_progress: is called while samples are read into memory.
        initialize: is called with the new model, to load weights into it.
        check_dataset: is called with the data set before anything uses its samples, and returns notes.

    Raises:
        ConfigError: wrong arguments or values, or no validation data.
        DataError: a data set cannot be read.
        OutOfMemoryError: there is too little memory for an object.
        UserCodeError: code that a `_target_` names raised another error.
    """
    with memory_errors():
        return _build_evaluation(settings, facts, on_progress, initialize, check_dataset)


def _build_evaluation(
    settings: Settings,
    facts: TrainingFacts | None,
    on_progress: OnProgress | None,
    initialize: Initialize | None,
    check_dataset: CheckDataset | None,
) -> EvaluationSession:
    problems = settings.find_wrong_targets()
    if problems:
        raise ConfigError(*problems)
    device = prepare_process(settings)
    settings, train, val, held_out, notes = _build_data(settings, facts, device, on_progress)
    notes += [] if check_dataset is None else check_dataset(val.dataset)
    seed_all(settings.seed, deterministic=bool(settings.deterministic))  # as in a training
    metrics = build_metrics(settings, device)["val"]
    loaders = [loader for loader in (train, val) if loader is not None]
    model, loss_fn, module_notes = build_modules(settings, device, loaders, initialize)
    optimizer = torch.optim.SGD([torch.zeros(0)])  # a state needs one; it updates nothing
    step = build_step(settings.evaluation_step, "evaluation_step", device)
    refuse_generator(step)
    state = build_state(settings, device, model, loss_fn, {"optim": optimizer}, val, (None, step))
    state.objects.val_metrics = metrics
    state.progress.batches = 0 if train is None else len(train)
    if settings.compile:  # last: the averaged model must stay uncompiled
        compile_model(model, "default" if settings.compile is True else settings.compile)
    return EvaluationSession(settings, state, train, val, held_out, [*notes, *module_notes])


def _build_data(
    settings: Settings, facts: TrainingFacts | None, device: torch.device, on_progress: OnProgress | None
) -> tuple[Settings, Loader | None, Loader, bool, list[str]]:
    """Return settings with the number of classes, the loaders (training first), `held_out` and notes."""
    if facts is None:
        settings, data = build_loaders(settings, device, on_progress)
        if data.val is None:
            raise _no_validation()
        return settings, data.train, data.val, data.held_out, data.notes
    settings = settings.with_data(classes=facts.classes)
    dataset = None if settings.data.val is None else build_dataset(settings, "val")
    held_out = dataset is None
    if dataset is None:
        seed_all(settings.seed, deterministic=bool(settings.deterministic))  # a training builds the training set first
        stores = build_stores(settings, device, on_progress)
        store, notes = stores.val, stores.notes
        if store is None:
            raise _no_validation()
    else:
        if not is_stream(dataset) and len(dataset) == 0:
            raise empty_error("val")
        store = store_samples(settings, "val", dataset, device, on_progress, build_form(settings))
        notes = [f"validation data: {describe_samples(store, settings)}"]
    return settings, None, build_loader(settings, store, device, facts.standardize, train=False), held_out, notes


def _no_validation() -> ConfigError:
    cause = "there is no validation data: data.val gives no data set, and data.split is off"
    return ConfigError(cause, hint="write data.split=0.2, or 'data.val=${data.train}'")

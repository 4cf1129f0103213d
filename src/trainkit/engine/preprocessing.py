"""Describe the preprocessing of a training, so that its model can be used without the training data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from trainkit.build.data import build_loaders
from trainkit.config.settings import Settings
from trainkit.core.device import select_device
from trainkit.core.pytree import Samples, dtype_name, is_list_of_values
from trainkit.core.rng import preserve_rng, seed_all
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Prepare
from trainkit.data.sample_errors import base_of
from trainkit.runs.directory import Run
from trainkit.runs.preprocessing import Preprocessing, Statistics, read_preprocessing


def describe_preprocessing(settings: Settings, train: Loader) -> Preprocessing:
    """Return the preprocessing of a training with these settings and this loader of training samples."""
    inputs = None
    with suppress(Exception), preserve_rng():  # the training reports samples that cannot be read
        inputs = _describe_inputs(train.raw_example()[0])
    names = class_names(train.dataset)
    return Preprocessing(
        inputs,
        normalize=_normalization(settings),
        standardize=_standardization(train) if settings.data.standardize else None,
        classes=names if names is not None and len(names) == settings.data.classes else None,
        reader=_reader_of(base_of(train.dataset)),
    )


def preprocessing_of_run(run: Run, settings: Settings) -> Preprocessing:
    """Return the preprocessing of a saved run: its file, or that of its training data if an earlier version trained it.

    Args:
        run: the saved run.
        settings: its settings.

    Raises:
        CheckpointError: the file is damaged.
        DataError: the file is missing, and the training data cannot be read.
    """
    found = read_preprocessing(run)
    if found is not None:
        return found
    with preserve_rng():
        seed_all(settings.seed, deterministic=bool(settings.deterministic))
        settings, loaders = build_loaders(settings, select_device("cpu"), None)
        try:
            return describe_preprocessing(settings, loaders.train)
        finally:
            for loader in filter(None, (loaders.train, loaders.val)):
                loader.close()


def class_names(dataset: Any) -> list[str] | None:
    """Return the names in the attribute `classes` of a data set, as text; None if it has no ordered names."""
    names: Any = getattr(base_of(dataset), "classes", None)
    with suppress(TypeError):  # a number of classes, or None
        if len(names) and not isinstance(names, str | Mapping | Set):
            return [str(name) for name in names]
    return None


def restore_prepare(preprocessing: Preprocessing | None, device: torch.device) -> Prepare:
    """Return what makes inputs of the model from a batch of raw inputs, with the bits of the training."""
    statistics = None if preprocessing is None else preprocessing.standardize or preprocessing.normalize
    if preprocessing is None or statistics is None:
        return Prepare(device)
    dtype = torch.float64 if preprocessing.standardize else torch.get_default_dtype()  # as `build_prepare`
    return Prepare(device, *as_tensors(statistics, dtype))


def as_tensors(statistics: Statistics, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation as tensors: (1,), or one number for each channel."""
    return torch.tensor(statistics.mean, dtype=dtype), torch.tensor(statistics.std, dtype=dtype)


def _describe_inputs(batch: Any) -> Any:
    """Return the structure of the first sample of a batch; see `Preprocessing.inputs`."""
    if isinstance(batch, Tensor):
        return _describe_tensor(batch[0])
    if isinstance(batch, Samples):
        return _describe_sample(batch[0])
    if isinstance(batch, Mapping):
        return {str(key): _describe_inputs(value) for key, value in batch.items()}
    if is_list_of_values(batch):
        return {"type": type(batch[0]).__name__}
    if isinstance(batch, tuple | list):
        return [_describe_inputs(part) for part in batch]
    return {"type": type(batch).__name__}


def _describe_sample(sample: Any) -> Any:
    if isinstance(sample, Tensor):
        return _describe_tensor(sample)
    if isinstance(sample, Mapping):
        return {str(key): _describe_sample(value) for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        return [_describe_sample(part) for part in sample]
    return {"type": type(sample).__name__}


def _describe_tensor(sample: Tensor) -> dict[str, Any]:
    return {"shape": [*sample.shape], "dtype": dtype_name(sample)}


def _reader_of(dataset: Any) -> dict[str, Any] | None:
    """Return the attribute `reader` of a data set if it describes how a file becomes a sample."""
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, Mapping) and isinstance(reader.get("kind"), str):
        with suppress(TypeError, ValueError):  # not JSON
            content: dict[str, Any] = json.loads(json.dumps(reader))
            return content
    return None


def _normalization(settings: Settings) -> Statistics | None:
    normalize = settings.data.normalize
    if normalize is None:
        return None
    mean, std = ([*part] if isinstance(part, list | tuple) else [part] for part in (normalize.mean, normalize.std))
    channels = max(len(mean), len(std))
    return Statistics(*([float(x) for x in (part * channels if len(part) == 1 else part)] for part in (mean, std)))


def _standardization(train: Loader) -> Statistics | None:
    mean, std = train.prepare.mean, train.prepare.std
    return None if mean is None or std is None else Statistics(mean.double().tolist(), std.double().tolist())

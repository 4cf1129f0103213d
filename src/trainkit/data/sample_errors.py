"""Errors about samples. Messages have one line, because an error may have to leave a worker process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Subset

from trainkit.core.errors import ConfigError, DataError, TrainkitError, UserCodeError
from trainkit.core.pytree import structure_of
from trainkit.core.source import name_and_place
from trainkit.data.streams import StreamStateError, reading_method


class RandomSampleError(Exception):
    """Reading a sample drew random numbers."""


class MixedTargetsError(Exception):
    """Some samples have their inputs as target, and others do not."""


class UnequalSamplesError(ValueError):
    """Samples differ in shape, type or keys."""


class NotAPairError(ValueError):
    """A sample is not a pair (inputs, target)."""


class SampleFormError(ValueError):
    """A sample does not have a key that the config names. The message has the cause and, after `FIX`, the fix."""


FIX = "; fix: "
BY_COLLATE = "raised by data.collate"  # begins the note of an error that `data.collate` raised


def base_of(dataset: Any) -> Any:
    """Return the data set whose `__getitem__` makes the samples: that inside of torch's subsets."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def unequal_samples_error(dataset: Any, names: list[str], pairs: list[Any]) -> UnequalSamplesError:
    """Return the error for two samples, their names and (inputs, target), that do not fit into one batch."""
    shown = []
    for name, (inputs, target) in zip(names, pairs, strict=True):
        parts = [str(structure_of(part)).replace("'", "") for part in (inputs, target)]
        inputs, target = (text if len(text) < 80 else f"{text[:77]}..." for text in parts)
        shown.append(f"{name} is inputs {inputs}, target {target}")
    base = base_of(dataset)
    whose = name_and_place(type(base), reading_method(base))
    return UnequalSamplesError(
        f"the samples of a batch must have equal shapes, but those of {whose} differ: {'; '.join(shown)}"
    )


def not_a_pair_error(dataset: Any, sample: Any) -> NotAPairError:
    """Return the error for a sample that is not a pair."""
    base = base_of(dataset)
    method = reading_method(base)
    verb = "yields" if method == "__iter__" else "returns"
    whose, found = name_and_place(type(base), method), describe_sample(sample)
    return NotAPairError(f"{method} of {whose} {verb} {found}, and a sample must be a pair (inputs, target)")


def describe_sample(sample: Any) -> str:
    """Return the type of a sample, and its keys, length or shape."""
    kind = type(sample).__name__
    if sample is None:
        return "None"
    if isinstance(sample, Mapping):
        keys = ", ".join(map(repr, list(sample)[:8])) + (", ..." if len(sample) > 8 else "")
        return f"a {kind} with the keys {keys}"
    if isinstance(sample, tuple | list):
        return f"a {kind} of {len(sample)} value{'s' * (len(sample) != 1)}"
    return f"a {kind} {structure_of(sample)}" if hasattr(sample, "shape") else f"a {kind}"


def key_of_sample_error(key: str, error: BaseException) -> str:
    """Return the config key of the code that raised an error while samples were read: `key`, or `data.collate`."""
    lines = [*str(error).splitlines(), *getattr(error, "__notes__", ())]  # a worker's notes are in the message
    return "data.collate" if any(line.startswith(BY_COLLATE) for line in lines) else key


def sample_error(key: str, error: Exception) -> TrainkitError:
    """Return the error to show for an error that was raised while samples were read. `key` is that of the data set."""
    return explain_sample_error(key, error) or UserCodeError(key_of_sample_error(key, error), error)


def explain_sample_error(key: str, error: BaseException) -> TrainkitError | None:
    """Return the error to show for samples that do not fit; None for any other error.

    Args:
        key: the config key of the data set.
        error: may come from a worker process, whose traceback is then part of the message.
    """
    kind = type(error)
    text = (str(error).strip().splitlines() or [""])[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")
    if isinstance(error, UnequalSamplesError):
        hint = "write data.collate=pad, pad the samples in the data set, or keep them in a list: data.collate=lists"
        return DataError(f"{key}: {text}", hint=hint)
    if isinstance(error, NotAPairError):
        hint = "write return inputs, target in __getitem__"
        hint = "write yield inputs, target in __iter__" if text.startswith("__iter__") else hint
        if re.search(r"(?:returns|yields) a (tuple|list) of (?!0|2)", text):
            hint += ", or say which positions they are: data.inputs=[0,1] data.targets=2"
        return ConfigError(f"{key}: {text}", hint=hint)
    if isinstance(error, StreamStateError):
        hint = "let state_dict return numbers, strings, tensors, lists and dicts"
        return ConfigError(f"{key}: {text}", hint=hint)
    if isinstance(error, SampleFormError):
        cause, _, fix = text.partition(FIX)
        return ConfigError(cause, hint=fix)
    return None

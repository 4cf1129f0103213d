"""The form of samples: which parts are the inputs and the targets, and how samples become a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainkit.core.pytree import batch_size_of, describe, tensors_in
from trainkit.core.source import name_and_place
from trainkit.core.spelling import did_you_mean
from trainkit.data.pairs import Pair
from trainkit.data.sample_errors import FIX, NotAPairError, SampleFormError, base_of, describe_sample, not_a_pair_error
from trainkit.data.streams import reading_method

TARGET_KEYS = ("targets", "target", "labels", "label", "y")  # the first of these that a mapping has

SEQUENCES = (tuple, list)  # faster than `tuple | list`, which makes a new object in each call

Key = str | int
Keys = Key | Sequence[Key] | None


@dataclass(frozen=True)
class SampleForm:
    """Which parts of a sample are the inputs and the targets, and how samples become a batch.

    Attributes:
        inputs: the key of the inputs in a mapping, or their position in a tuple. Several keys of a mapping make a
            mapping, several positions make a tuple. None: all keys but that of the targets.
        targets: the key or the keys of the targets. None: the first of `TARGET_KEYS`.
        targets_too: without `inputs`, a mapping of inputs contains the targets, for a model that computes its loss.
        collate: makes a batch of a list of samples, and `pair` is then applied to the batch. None: `pair` is applied
            to each sample, and torch's default makes the batch.
    """

    inputs: Keys = None
    targets: Keys = None
    targets_too: bool = False
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def own_collate(self) -> Any:
        """Return `collate` if it is custom code, without the arguments of a partial function; else None."""
        function: Any = getattr(self.collate, "func", self.collate)
        return None if function is None or function.__module__.startswith("trainkit.") else function

    def pair(self, sample: Any, dataset: Any) -> Pair:
        """Return the inputs and the targets of a sample or a batch; the same object twice for a bare tensor.

        Raises:
            NotAPairError: the sample is not a pair, and `inputs` and `targets` do not say what it is.
            SampleFormError: a key does not exist.
        """
        unnamed = self.inputs is None and self.targets is None
        is_sequence = isinstance(sample, SEQUENCES)
        if unnamed and is_sequence and len(sample) == 2:
            return sample[0], sample[1]
        if isinstance(sample, Mapping):
            return self._pair_of(sample, dataset, joins=dict)
        if is_sequence and hasattr(sample, "_fields") and any(isinstance(key, str) for key in self._keys()):
            return self._pair_of(sample._asdict(), dataset, joins=dict)
        if is_sequence and not unnamed:
            return self._pair_of(dict(enumerate(sample)), dataset, joins=lambda parts: tuple(parts.values()))
        if not is_sequence and (hasattr(sample, "shape") or hasattr(sample, "getbands")):
            if not unnamed:
                raise self._wrong_key(next(iter(self._keys())), {}, dataset, sample)
            return sample, sample
        raise not_a_pair_error(dataset, sample)

    def pair_of_batch(self, batch: Any, dataset: Any, samples: int) -> Pair:
        """Return the inputs and the targets of a batch that `collate` has made of so many samples.

        Raises:
            SampleFormError: the batch is not a pair, lacks a key, or its inputs have no dimension for the samples.
        """
        whose = name_and_place(getattr(self.collate, "func", self.collate), "__call__")
        try:
            inputs, targets = self.pair(batch, dataset if self.own_collate is None else self.own_collate)
        except NotAPairError:
            fix = "write return inputs, targets"
            cause = f"data.collate: {whose} returns {describe_sample(batch)}, and a batch must be a pair"
            raise SampleFormError(f"{cause} (inputs, targets){FIX}{fix}") from None
        for name, part in (("inputs", inputs), ("targets", targets)):
            wrong = not tensors_in(part) and name == "inputs" and not isinstance(part, list | tuple | Mapping)
            wrong |= any(not tensor.dim() for tensor in tensors_in(part)[:1])
            wrong |= type(part) is list and len(part) == samples and batch_size_of(part) != samples
            if wrong:
                cause = f"data.collate: the {name} that {whose} returns for {samples} samples are {describe(part)}"
                fix = "return tensors (N, ...), or trainkit.data.Samples(entries) with an entry per sample"
                raise SampleFormError(f"{cause}{FIX}{fix}")
        return inputs, targets

    def _pair_of(self, parts: Mapping[Any, Any], dataset: Any, joins: Callable[[dict[Any, Any]], Any]) -> Pair:
        """Return inputs and targets of a sample with keys; `joins` makes one object of several parts."""

        def take(keys: Keys) -> Any:
            if isinstance(keys, str | int):
                return parts[keys]
            return joins({key: take(key) for key in keys or ()})

        for key in self._keys():
            if key not in parts:
                raise self._wrong_key(key, parts, dataset)
        by_position = 0 in parts
        targets_too = self.targets_too and not by_position
        targets: Keys = self.targets
        if targets is None:
            others = _listed(self.inputs)
            rest = [key for key in parts if key not in others]
            named = rest if by_position else [key for key in TARGET_KEYS if key in parts]
            targets = named[0] if named and (not by_position or len(rest) == 1) else None
        if targets is None and not targets_too:
            raise self._no_targets(parts, dataset)
        inputs = self.inputs
        if inputs is None:
            inputs = [key for key in parts if targets_too or key not in _listed(targets)]
            inputs = inputs[0] if len(inputs) == 1 and not targets_too else inputs or targets
        taken = take(inputs)
        return taken, taken if targets is None or targets == inputs else take(targets)

    def _keys(self) -> list[Key]:
        return [*_listed(self.inputs), *_listed(self.targets)]

    def _wrong_key(self, key: Key, parts: Mapping[Any, Any], dataset: Any, sample: Any = None) -> SampleFormError:
        name = f"data.{'inputs' if key in _listed(self.inputs) else 'targets'}"
        found = f"have {_shown(parts)}" if parts else f"are {describe_sample(sample)}, without keys"
        fix = did_you_mean(str(key), [str(known) for known in parts], f"{name}=") or f"remove {name}"
        return SampleFormError(f"{name}={key}: the samples of {_whose(dataset)} {found}{FIX}{fix}")

    def _no_targets(self, parts: Mapping[Any, Any], dataset: Any) -> SampleFormError:
        if 0 in parts:
            fix = f"for example data.inputs=0 data.targets={len(parts) - 1}"
            cause = f"data.targets: the samples of {_whose(dataset)} have {_shown(parts)}, and it is unknown which are"
            return SampleFormError(f"{cause} the targets{FIX}{fix}")
        cause = f"data.targets: the samples of {_whose(dataset)} have {_shown(parts)}, and none is a known name of"
        return SampleFormError(f"{cause} the targets{FIX}write data.targets=KEY; it may be a key of the inputs, too")


PAIRS = SampleForm()


def _listed(keys: Keys) -> list[Key]:
    if keys is None:
        return []
    return [keys] if isinstance(keys, str | int) else [*keys]


def _shown(parts: Mapping[Any, Any]) -> str:
    if 0 in parts:
        return f"{len(parts)} values (data.inputs and data.targets give positions from 0)"
    return f"the keys {', '.join(map(repr, [*parts][:12]))}" + (", ..." if len(parts) > 12 else "")


def _whose(dataset: Any) -> str:
    """Return the name and the place of the code that makes the samples, or of a `collate` that makes the batches."""
    base = base_of(dataset)
    return name_and_place(base if inspect.isroutine(base) else type(base), reading_method(base))

"""The form of samples: which parts are the inputs and the targets, and how samples become a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainkit.core.pytree import batch_size_of, describe, tensors_in
from trainkit.core.source import name_and_place, without_partial
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
            mapping. Several positions make a tuple. None: all keys except the key of the targets.
        targets: the key or the keys of the targets. None: the first of `TARGET_KEYS` that exists.
        targets_too: if `inputs` is None, all keys of a mapping are inputs, for a model that computes its own loss.
        collate: makes a batch of a list of samples. `pair` is then applied to the batch. None: `pair` is applied
            to each sample, and torch's default makes the batch.
    """

    inputs: Keys = None
    targets: Keys = None
    targets_too: bool = False
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def own_collate(self) -> Any:
        """Return `collate` without partial arguments if it is custom code; None for a `collate` of trainkit."""
        function = without_partial(self.collate)
        return None if function is None or function.__module__.startswith("trainkit.") else function

    def pair(self, sample: Any, dataset: Any) -> Pair:
        """Return the inputs and the targets of a sample or a batch. A bare tensor is both.

        Raises:
            NotAPairError: the sample is not a pair, and the config names neither inputs nor targets.
            SampleFormError: a key does not exist.
        """
        unnamed = self.inputs is None and self.targets is None
        is_sequence = isinstance(sample, SEQUENCES)
        if unnamed and is_sequence and len(sample) == 2:
            return sample[0], sample[1]
        if isinstance(sample, Mapping):
            return self._pair_of(sample, dataset, join=dict)
        if is_sequence and hasattr(sample, "_fields") and any(isinstance(key, str) for key in self._keys()):
            return self._pair_of(sample._asdict(), dataset, join=dict)
        if is_sequence and not unnamed:
            return self._pair_of(dict(enumerate(sample)), dataset, join=lambda entries: tuple(entries.values()))
        if not is_sequence and (hasattr(sample, "shape") or hasattr(sample, "getbands")):
            if not unnamed:
                raise self._wrong_key(next(iter(self._keys())), {}, dataset, sample)
            return sample, sample
        raise not_a_pair_error(dataset, sample)

    def pairs(self, samples: Sequence[Any], dataset: Any) -> Sequence[Any]:
        """Return the inputs and the targets of each sample, see `pair`."""
        if self.inputs is None and self.targets is None and all(type(s) is tuple and len(s) == 2 for s in samples):
            return samples
        return [self.pair(sample, dataset) for sample in samples]

    def pair_of_batch(self, batch: Any, dataset: Any, samples: int) -> Pair:
        """Return the inputs and the targets of a batch that `collate` made of a number of samples.

        Raises:
            SampleFormError: the batch is not a pair, lacks a key, or its inputs have no dimension for the samples.
        """
        name = name_and_place(without_partial(self.collate), "__call__")
        try:
            inputs, targets = self.pair(batch, dataset if self.own_collate is None else self.own_collate)
        except NotAPairError:
            fix = "write return inputs, targets"
            cause = f"data.collate: {name} returns {describe_sample(batch)}, and a batch must be a pair"
            raise SampleFormError(f"{cause} (inputs, targets){FIX}{fix}") from None
        for side, part in (("inputs", inputs), ("targets", targets)):
            is_wrong = side == "inputs" and not tensors_in(part) and not isinstance(part, list | tuple | Mapping)
            is_wrong |= any(not tensor.dim() for tensor in tensors_in(part)[:1])
            is_wrong |= type(part) is list and len(part) == samples and batch_size_of(part) != samples
            if is_wrong:
                cause = f"data.collate: the {side} that {name} returns for {samples} samples are {describe(part)}"
                fix = "return tensors (N, ...), or trainkit.data.Samples(entries) with an entry per sample"
                raise SampleFormError(f"{cause}{FIX}{fix}")
        return inputs, targets

    def _pair_of(self, entries: Mapping[Any, Any], dataset: Any, join: Callable[[dict[Any, Any]], Any]) -> Pair:
        """Return the inputs and the targets of a sample with several entries.

        Args:
            entries: the entries of the sample, by their keys or positions.
            dataset: the data set, for messages.
            join: makes one object of several entries.
        """

        def take(keys: Keys) -> Any:
            if isinstance(keys, str | int):
                return entries[keys]
            return join({key: take(key) for key in keys or ()})

        for key in self._keys():
            if key not in entries:
                raise self._wrong_key(key, entries, dataset)
        targets_too = self.targets_too and 0 not in entries
        targets = self._default_targets(entries) if self.targets is None else self.targets
        if targets is None and not targets_too:
            raise self._no_targets(entries, dataset)
        inputs = self.inputs
        if inputs is None and targets_too:
            inputs = [*entries]
        elif inputs is None:
            rest = [key for key in entries if key not in _as_list(targets)]
            inputs = rest[0] if len(rest) == 1 else rest or targets
        taken = take(inputs)
        return taken, taken if targets is None or targets == inputs else take(targets)

    def _default_targets(self, entries: Mapping[Any, Any]) -> Key | None:
        """Return the key of the targets if the config does not name it; None if it is unknown."""
        if 0 not in entries:
            return next((key for key in TARGET_KEYS if key in entries), None)
        rest = [position for position in entries if position not in _as_list(self.inputs)]
        return rest[0] if len(rest) == 1 else None

    def _keys(self) -> list[Key]:
        return [*_as_list(self.inputs), *_as_list(self.targets)]

    def _wrong_key(self, key: Key, entries: Mapping[Any, Any], dataset: Any, sample: Any = None) -> SampleFormError:
        name = f"data.{'inputs' if key in _as_list(self.inputs) else 'targets'}"
        found = f"have {_describe_keys(entries)}" if entries else f"are {describe_sample(sample)}, without keys"
        fix = did_you_mean(str(key), [str(known) for known in entries], f"{name}=") or f"remove {name}"
        return SampleFormError(f"{name}={key}: the samples of {_origin_of(dataset)} {found}{FIX}{fix}")

    def _no_targets(self, entries: Mapping[Any, Any], dataset: Any) -> SampleFormError:
        found = f"the samples of {_origin_of(dataset)} have {_describe_keys(entries)}"
        if 0 in entries:
            cause = f"data.targets: {found}, and it is unknown which are the targets"
            return SampleFormError(f"{cause}{FIX}for example data.inputs=0 data.targets={len(entries) - 1}")
        cause = f"data.targets: {found}, and none is a known name of the targets"
        return SampleFormError(f"{cause}{FIX}write data.targets=KEY; it may be a key of the inputs, too")


PAIRS = SampleForm()


def _as_list(keys: Keys) -> list[Key]:
    if keys is None:
        return []
    return [keys] if isinstance(keys, str | int) else [*keys]


def _describe_keys(entries: Mapping[Any, Any]) -> str:
    if 0 in entries:
        return f"{len(entries)} values (data.inputs and data.targets give positions from 0)"
    return f"the keys {', '.join(map(repr, [*entries][:12]))}" + (", ..." if len(entries) > 12 else "")


def _origin_of(dataset: Any) -> str:
    """Return the name and the place of the code that makes the samples, or of a `collate` that makes the batches."""
    base = base_of(dataset)
    return name_and_place(base if inspect.isroutine(base) else type(base), reading_method(base))

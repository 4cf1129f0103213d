"""Random number generators: seed, capture and restore the RNG states of Python, NumPy and torch."""

from __future__ import annotations

import ctypes
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch, and choose whether torch uses deterministic algorithms only."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the setter imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)


def rng_state() -> dict[str, Any]:
    """Return the RNG states of Python, NumPy, torch and CUDA as plain containers and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), words, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the RNG states that `rng_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for index, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, index)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore all RNG states at the end of the block."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


# ------------------------------------------------------------------------- around the reading of samples


@dataclass(frozen=True)
class GlobalGenerator:
    """A random number generator that the whole process shares."""

    get_state: Callable[[], Any]
    set_state: Callable[[Any], None]
    seed: Callable[[int], None]


def _numpy_state() -> Any:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return kind, np.asarray(keys).tobytes(), *rest  # bytes, because arrays do not compare to one truth value


def _set_numpy_state(state: Any) -> None:
    kind, keys, *rest = state
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))


def _seed_numpy(seed: int) -> None:
    # NumPy and torch use the same generator: equal seeds would give them equal numbers.
    np.random.seed(zlib.crc32(b"numpy", seed))


PYTHON_GENERATOR = GlobalGenerator(random.getstate, random.setstate, random.seed)
NUMPY_GENERATOR = GlobalGenerator(_numpy_state, _set_numpy_state, _seed_numpy)


class RngSnapshot:
    """The CPU RNG states of Python, NumPy and torch at the time it is made; faster than `rng_state`."""

    def __init__(self) -> None:
        self.states = {generator: generator.get_state() for generator in (PYTHON_GENERATOR, NUMPY_GENERATOR)}
        self.torch_state = torch.get_rng_state()

    def restore(self) -> set[GlobalGenerator]:
        """Restore the states; return those of Python's and NumPy's generators that were used since the snapshot.

        If a signal interrupts the call, call it again.
        """
        advanced = {generator for generator, state in self.states.items() if generator.get_state() != state}
        for generator in advanced:
            generator.set_state(self.states[generator])
        torch.set_rng_state(self.torch_state)
        return advanced


_numpy: Any = np.random  # NumPy's types leave out two public functions
MT19937_BYTES = 624 * 4 + 4  # the state of NumPy's global generator: its words and its position


class SeparateGenerators:
    """Global generators of Python, NumPy and torch for code that reads data, apart from those of the model.

    Reading NumPy's state takes longer than many batches, so the bit generator is exchanged. This loses the second of
    two normal numbers, which NumPy keeps for the next draw. So the state is restored if that number exists.
    """

    def __init__(self) -> None:
        self.own = np.random.MT19937(0)
        self.known = b""  # the words of the model's generator when it was last looked at
        self.has_normal = False  # whether it then kept a normal number

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchange NumPy's generator, and restore all generators at the end of the block."""
        model = _numpy.get_bit_generator()
        words = b""
        if isinstance(model, np.random.MT19937):
            words = ctypes.string_at(model.ctypes.state_address, MT19937_BYTES)
        python_state, torch_state, numpy_state = random.getstate(), torch.get_rng_state(), None
        if self.has_normal or words != self.known or not words:
            numpy_state = _numpy.get_state(legacy=True)
            self.known, self.has_normal = words, bool(numpy_state[3])

        def restore() -> None:
            _numpy.set_bit_generator(model)
            if self.has_normal and numpy_state is not None:
                np.random.set_state(numpy_state)
            random.setstate(python_state)
            torch.set_rng_state(torch_state)

        _numpy.set_bit_generator(self.own)
        try:
            yield
        finally:
            try:
                restore()
            except BaseException:  # a signal may have interrupted the restore
                restore()
                raise

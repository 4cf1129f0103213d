"""Random number generators: seed, capture and restore the RNG states of Python, NumPy and torch."""

from __future__ import annotations

import ctypes
import os
import random
import sys
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


@dataclass(frozen=True, eq=False)  # compared by identity, which is faster
class GlobalGenerator:
    """A random number generator that the whole process shares."""

    seed: Callable[[int], Any]


def _seed_numpy(seed: int) -> None:
    # NumPy and torch use the same generator: equal seeds would give them equal numbers.
    np.random.seed(zlib.crc32(b"numpy", seed))


PYTHON_GENERATOR = GlobalGenerator(random.seed)
NUMPY_GENERATOR = GlobalGenerator(_seed_numpy)
TORCH_GENERATOR = GlobalGenerator(torch.default_generator.manual_seed)

_numpy: Any = np.random  # NumPy's types leave out two public functions
MT19937_BYTES = 624 * 4 + 4  # the state of a Mersenne twister: its words, and its position before or after them


def _memory_of_python_state() -> memoryview | None:
    """Return the memory of the state of Python's global generator; None if this Python keeps it in an unknown way.

    CPython keeps the position and the words behind the header of the object. A probe shows whether this one does.
    """
    if sys.implementation.name != "cpython" or random.Random.__basicsize__ < object.__basicsize__ + MT19937_BYTES:
        return None
    probe, generator = random.Random(1), getattr(random, "_inst", None)
    position, *words = (ctypes.c_uint32 * 625).from_address(id(probe) + object.__basicsize__)
    is_known = (*words, position) == probe.getstate()[1] and type(generator) is random.Random
    state = ctypes.c_ubyte * MT19937_BYTES
    return memoryview(state.from_address(id(generator) + object.__basicsize__)).cast("B") if is_known else None


PYTHON_STATE = _memory_of_python_state()


def python_state() -> Any:
    """Return the state of Python's global generator; as bytes where possible, because 625 Python numbers take long."""
    if PYTHON_STATE is None:
        return random.getstate()
    return bytes(PYTHON_STATE), random._inst.gauss_next  # type: ignore[attr-defined]


def set_python_state(state: Any) -> None:
    """Set the state that `python_state` returned."""
    if PYTHON_STATE is None:
        random.setstate(state)
        return
    PYTHON_STATE[:], random._inst.gauss_next = state  # type: ignore[attr-defined]


def _flag_of_kept_normal() -> ctypes.c_int | None:
    """Return the number by which NumPy's global generator says that it keeps a normal number; None if unknown.

    NumPy makes two normal numbers at once, and keeps the second for the next draw. A probe shows the place.
    """
    probe, found = np.random.RandomState(0), []
    for _ in range(3):
        found.append(np.frombuffer(ctypes.string_at(id(probe), np.random.RandomState.__basicsize__), np.int32))
        probe.normal()
    places = np.flatnonzero((found[0] == 0) & (found[1] == 1) & (found[2] == 0))
    if sys.implementation.name != "cpython" or len(places) != 1:
        return None
    return ctypes.c_int.from_address(id(_numpy.mtrand._rand) + 4 * int(places[0]))


KEPT_NORMAL = _flag_of_kept_normal()


class SeparateGenerators:
    """Global generators of Python, NumPy and torch for code that reads data, apart from those of the model.

    NumPy's state is slow to read, so its bit generator is exchanged. This loses a normal number that NumPy keeps, so
    the state is restored if there is one.
    """

    def __init__(self) -> None:
        self.own = np.random.MT19937(0)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchange NumPy's generator, and restore all generators at the end of the block."""
        model, numpy_state = _numpy.get_bit_generator(), None
        if KEPT_NORMAL is None or KEPT_NORMAL.value:  # it keeps a normal number, or may keep one
            numpy_state = _numpy.get_state(legacy=False)
        python_before, torch_before = python_state(), torch.get_rng_state()

        def restore() -> None:
            _numpy.set_bit_generator(model)
            if numpy_state is not None:
                np.random.set_state(numpy_state)
            set_python_state(python_before)
            torch.set_rng_state(torch_before)

        try:
            _numpy.set_bit_generator(self.own)
            yield
        finally:
            try:
                restore()
            except BaseException:  # a signal may have interrupted the restore
                restore()
                raise

    def states(self) -> dict[GlobalGenerator, Any]:
        """Return the state of each generator in the block, which can be compared: a draw changes it."""
        words = ctypes.string_at(self.own.ctypes.state_address, MT19937_BYTES)
        torch_state = torch.get_rng_state().numpy().tobytes()
        return {PYTHON_GENERATOR: python_state(), NUMPY_GENERATOR: words, TORCH_GENERATOR: torch_state}

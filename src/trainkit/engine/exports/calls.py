"""Call a model with random inputs of any batch size, and compare outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.errors import ExportError, UserCodeError
from trainkit.core.modes import evaluating
from trainkit.core.pytree import describe
from trainkit.core.rng import preserve_rng
from trainkit.core.source import name_and_place
from trainkit.training.call import choose_call, install_call
from trainkit.training.carried import carrying_modules, without_carried

BATCH_SIZES = (1, 2, 7)  # of the comparisons
TRACED = 2  # samples of the batch that the exporters follow; torch treats a size of 1 as a constant
SHAPE_SIZES = (TRACED, BATCH_SIZES[-1])  # two batches, whose shapes show which sizes depend on the batch size
DEFAULT_IDS = 2  # how many numbers are drawn for inputs of integers if the model has no embedding

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a model.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        names: the names of all tensors in both, in order.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: list[str]

    @property
    def named(self) -> Named:
        """All tensors with their names."""
        return list(zip(self.names, self.tensors, strict=True))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the arguments, in order."""
        return [tensor for _, tensor in named_tensors([*self.args, *self.kwargs.values()], "")]


class Caller:
    """Calls a model as the training does, with random inputs.

    Args:
        model: in evaluation mode.
        sample: the raw inputs of a sample without values: a tree with a tensor of the device `meta` for each input.
        prepare: turns a batch of raw inputs into the inputs of the model.
        prepares_inside: whether the export takes raw inputs, and prepares them itself.
    """

    def __init__(
        self, model: nn.Module, sample: Any, prepare: Callable[[Any], Any], *, prepares_inside: bool = False
    ) -> None:
        self.model, self.sample, self.prepare, self.prepares_inside = model, sample, prepare, prepares_inside
        sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
        self.ids = min(sizes, default=DEFAULT_IDS)
        self.unpack, _ = choose_call(model, sample)
        if self.unpack is not None and isinstance(model, nn.Sequential):  # its first module takes the inputs apart
            install_call(model, sample)
            self.unpack = None

    def random(self, samples: int) -> Call:
        """Return a call of the export with a batch of random inputs. Equal sizes give equal inputs."""
        return self._call_of(self._inputs(samples, prepared=not self.prepares_inside))

    def expected(self, samples: int) -> Named:
        """Return the outputs of the model for the batch that `random` returns.

        Raises:
            UserCodeError: the model raised an error.
            ExportError: the outputs contain no tensor.
        """
        with preserve_rng():
            return self._outputs(samples)

    def check_repeatable(self) -> None:
        """Raise `ExportError` if the model returns other outputs when it is called again, or NaN."""
        name = name_and_place(self.model)
        with preserve_rng():
            first, second = self._outputs(TRACED), self._outputs(TRACED)
        if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for _, tensor in first):
            cause = f"model: {name} returns NaN for random inputs, so an export cannot be compared"
            raise ExportError(cause, hint="choose another checkpoint: --checkpoint last or step-N")
        if difference(first, second) != 0:
            cause = f"model: {name} returns different outputs for equal inputs, so an export cannot be compared"
            hint = "draw random numbers only if self.training, and keep no state from call to call"
            raise ExportError(cause, hint=hint)

    def _inputs(self, samples: int, *, prepared: bool) -> Any:
        generator = torch.Generator().manual_seed(samples)
        inputs = _draw(self.sample, "", samples, self.ids, generator)
        return self.prepare(inputs) if prepared else inputs

    def _call_of(self, inputs: Any) -> Call:
        """Return the call that passes the inputs of a batch to the model."""
        if self.unpack is None:
            return Call((inputs,), {}, [name for name, _ in named_tensors(inputs, "inputs")])
        if self.unpack.names is not None:
            kwargs = {name: inputs[name] for name in self.unpack.names}
            return Call((), kwargs, [name for key in kwargs for name, _ in named_tensors(kwargs[key], key)])
        names = [name for key, value in self._positional(inputs) for name, _ in named_tensors(value, key)]
        return Call(tuple(inputs), {}, names)

    def _positional(self, inputs: Any) -> Iterator[tuple[str, Any]]:
        bound = inspect.signature(self.model.forward).bind(*inputs)
        for name, value in bound.arguments.items():
            is_rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            yield from ((f"{name}_{i}", item) for i, item in enumerate(value)) if is_rest else [(name, value)]

    def _outputs(self, samples: int) -> Named:
        call = self._call_of(self._inputs(samples, prepared=True))
        try:
            with evaluating(self.model), without_carried(carrying_modules(self.model)):
                outputs = self.model(*call.args, **call.kwargs)
        except Exception as error:
            details = f"called with random inputs: {describe(call.args or call.kwargs)}"
            raise UserCodeError("model", error, exit_code=1, details=details) from error
        named = named_tensors(outputs, "outputs")
        if not named:
            cause = f"model: {name_and_place(self.model)} returns {describe(outputs)}, expected tensors"
            raise ExportError(cause, hint="write --format safetensors, which holds the weights alone")
        return named


def named_tensors(value: Any, name: str) -> Named:
    """Return the tensors in nested tuples, lists and mappings, with names made of keys and positions."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        top = name in ("inputs", "outputs", "")
        parts = [(str(key) if top else f"{name}_{key}", item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        parts = [(f"{name}_{position}", item) for position, item in enumerate(value)]
    else:
        parts = []
    return [found for part, item in parts for found in named_tensors(item, part)]


def difference(expected: Named, found: Named) -> float:
    """Return the largest difference between two outputs, relative to the largest expected value if that is over 1.

    It is infinite if shapes, dtypes or integers differ, or if infinite values are in other places.
    """
    if len(expected) != len(found):
        return float("inf")
    return max((_difference(a, b) for (_, a), (_, b) in zip(expected, found, strict=True)), default=0.0)


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.numel() == 0 or torch.equal(expected, found):
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float("inf")
    exact = torch.complex128 if expected.is_complex() else torch.float64
    expected, found = expected.to(exact), found.to(exact)
    finite = expected.isfinite()
    if not torch.equal(expected[~finite], found[~finite]) or not bool(found[finite].isfinite().all()):
        return float("inf")
    scale = max(1.0, float(expected[finite].abs().max()))
    return float((expected[finite] - found[finite]).abs().max()) / scale


def _draw(sample: Any, name: str, samples: int, ids: int, generator: torch.Generator) -> Any:
    """Return a batch with random values for a tree of tensors without values."""
    if isinstance(sample, Mapping):
        return {key: _draw(value, str(key), samples, ids, generator) for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        values = [_draw(value, name, samples, ids, generator) for value in sample]
        return type(sample)(*values) if hasattr(sample, "_fields") else type(sample)(values)
    if not isinstance(sample, Tensor):
        return sample
    shape = (samples, *sample.shape)
    if "mask" in name:  # a sample whose values are all masked gives NaN
        return torch.ones(shape, dtype=sample.dtype)
    if sample.dtype.is_floating_point or sample.dtype.is_complex:
        return torch.randn(shape, dtype=sample.dtype, generator=generator)
    high = 2 if sample.dtype == torch.bool else 256 if sample.dtype == torch.uint8 else ids
    return torch.randint(high, shape, generator=generator).to(sample.dtype)

"""The settings that may make a training faster without a change of its mathematics, or with a lower precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainkit.config.schema import UNNAMED
from trainkit.config.settings import Settings

PRECISIONS = {"cpu": ("bf16",), "cuda": ("tf32", "bf16", "fp16"), "mps": ("bf16", "fp16")}
COMPILE_MODES = {"cpu": ("true",), "cuda": ("true", "reduce-overhead", "max-autotune"), "mps": ()}


@dataclass(frozen=True)
class Choice:
    """Settings that are tried.

    Attributes:
        overrides: of the command line; none: the settings as they are.
        threads: the value of OMP_NUM_THREADS; None: as it is.
    """

    overrides: tuple[str, ...] = ()
    threads: int | None = None

    def __str__(self) -> str:
        threads = () if self.threads is None else (f"OMP_NUM_THREADS={self.threads}",)
        return " ".join((*threads, *self.overrides)) or "as it is"

    @property
    def lowers_precision(self) -> bool:
        """Whether the numbers change by more than the rounding of float32."""
        return any(override.startswith("precision=") for override in self.overrides)

    def with_choice(self, other: Choice) -> Choice | None:
        """Return both choices together; None if they set the same key."""
        if set(map(_key_of, self.overrides)) & set(map(_key_of, other.overrides)):
            return None
        if self.threads is not None and other.threads is not None:
            return None
        return Choice(self.overrides + other.overrides, self.threads or other.threads)


@dataclass(frozen=True)
class Facts:
    """What a process knows about the training that it has built.

    Attributes:
        device: the type of the device.
        threads: of torch.
        cores: that this process may use.
        memory_format: of the images, if the model has 2-D convolutions: channels_last or contiguous. None: it has none.
        is_streamed: the samples are read in each epoch.
        may_split: the batch may be split into micro batches.
        losses: the loss of each of the first steps.
        memory: the peak memory in bytes, see `core.device.peak_memory`.
    """

    device: str
    threads: int
    cores: int
    memory_format: str | None
    is_streamed: bool
    may_split: bool
    losses: tuple[float, ...]
    memory: int


def choices(settings: Settings, facts: Facts) -> Iterator[Choice]:
    """Yield what may be faster for a training, one change at a time."""
    if facts.device == "cpu":
        counts = {1, max(1, facts.cores // 2), facts.cores} - {facts.threads}
        yield from (Choice(threads=count) for count in sorted(counts))
    if facts.memory_format is not None:
        yield Choice((f"memory_format={'contiguous' if facts.memory_format == 'channels_last' else 'channels_last'}",))
    if facts.may_split and settings.micro_batch is None and settings.batch_size >= 4:
        yield from _of_key("micro_batch", (settings.batch_size // 2, settings.batch_size // 4))
    if facts.is_streamed:
        workers = {0, 1, 2, facts.cores} - {settings.data.num_workers}
        yield from _of_key("data.num_workers", sorted(workers))
        if settings.data.cache != "memory":
            yield Choice(("data.cache=memory",))
    if list(settings.optim) == [UNNAMED]:
        node = settings.optim[UNNAMED]
        if str(node["_target_"]).startswith("torch.optim.") and not {"fused", "foreach"} & set(node):
            yield Choice(("+optim.foreach=true",))
            yield Choice(("+optim.fused=false",))
    if not settings.compile:
        yield from _of_key("compile", COMPILE_MODES[facts.device])
    if settings.precision == "fp32":
        yield from _of_key("precision", PRECISIONS[facts.device])


def _of_key(key: str, values: Iterable[object]) -> Iterator[Choice]:
    return (Choice((f"{key}={value}",)) for value in values)


def _key_of(override: str) -> str:
    return override.lstrip("+").partition("=")[0]

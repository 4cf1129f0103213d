"""The keys of a config, with their types and allowed values."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """The allowed numbers of a key."""

    minimum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return abs(value) <= sys.float_info.max and (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"of at least": self.minimum, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


@dataclass(frozen=True)
class Pattern:
    """The allowed strings of a key, and their description for messages."""

    regex: str
    description: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.regex, value) is not None

    def __str__(self) -> str:
        return self.description


@dataclass(frozen=True)
class OneOrNamed:
    """Mark a key that holds one node with a `_target_`, or several named nodes.

    Settings hold a mapping of names to nodes. A node without a name is stored under `UNNAMED`.
    """

    optional: bool = False


Count = Annotated[int, Range(minimum=1)]
Positive = Annotated[float, Range(above=0)]
Node = dict[str, Any]  # a `_target_` with its arguments, or other keys that trainkit does not define
Position = Annotated[int, Range(minimum=0)]  # in a tuple
UNNAMED = ""
SAMPLERS = ("balanced", "length_bucketed", "contiguous")  # the short names of `data.sampler`
SUPERVISED = "supervised"  # the short name of the default `training_step` and `evaluation_step`
SHORT_FORMS = {"init_from": "path"}  # sections that may be written as the value of one of their keys
COLLATES = {"pad": "trainkit.data.Pad", "lists": "trainkit.data.lists"}  # short names of `data.collate`
METRICS = ("train/loss", "train/loss_sum", "val/loss", "val/accuracy", "grad_norm")  # that trainkit computes


def named_nodes(node: Any) -> dict[str, Any]:
    """Return the named nodes inside a node, or the node itself under the name `UNNAMED`."""
    several = isinstance(node, dict) and "_target_" not in node and any(isinstance(n, dict) for n in node.values())
    return {str(name): child for name, child in node.items()} if several else {UNNAMED: node}


def key_path(key: str, name: str) -> str:
    """Return the config key of a named node: `optim.muon`, or `optim` for an unnamed node."""
    return key if name == UNNAMED else f"{key}.{name}"


@dataclass(frozen=True)
class MonitorSettings:
    """The metric that decides the best epoch."""

    metric: str  # of `METRICS`, of `metrics`, or a metric that a hook adds
    mode: Literal["auto", "min", "max"]


@dataclass(frozen=True)
class EarlyStopSettings:
    """When to stop before the last epoch."""

    patience: Count | None
    min_delta: Annotated[float, Range(minimum=0)]


@dataclass(frozen=True)
class AugmentSettings:
    """Random changes of training images; see `trainkit.data.augment`."""

    flip: Literal["random", "alternating", True] | None
    crop_padding: Count | None
    crop_fill: Literal["zeros", "edge", "reflect"]
    cutout: Count | None
    mixup: Positive | None
    cutmix: Positive | None


@dataclass(frozen=True)
class NormalizeSettings:
    """(x - mean) / std of inputs from 0 to 1, with a number for all channels or one number per channel."""

    mean: float | list[float]
    std: Positive | list[Positive]


@dataclass(frozen=True)
class DataSettings:
    """The data sets and their reading. A data/*.yaml may add keys that its own values refer to."""

    train: Node
    val: Node | None
    split: Annotated[float, Range(above=0, below=1)] | None
    folds: Annotated[int, Range(minimum=2)] | None
    fold: Annotated[int, Range(minimum=0)] | None
    shuffle: Literal["on", True] | None
    drop_last: Literal["on", True] | None
    sampler: str | Node | None
    classes: Count | None
    inputs: str | Position | list[str] | list[Position] | None
    targets: str | Position | list[str] | list[Position] | None
    collate: str | Node | None
    normalize: NormalizeSettings | None
    standardize: Literal["on", True] | None
    augment: AugmentSettings | None
    cache: Literal["auto", "device", "memory", "none"] | None
    cache_limit: Literal["auto"] | Positive
    num_workers: Annotated[int, Range(minimum=0)]
    on_unreadable: Literal["stop", "skip"]


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save checkpoints, and how many to keep."""

    every_epochs: Count | None
    every_steps: Count | None
    every_minutes: Positive | None
    keep: Count
    weights: Literal["all", "trainable"]
    async_: Literal["auto", "on", True] | None  # the key is `async`, a word that Python reserves


@dataclass(frozen=True)
class InitFromSettings:
    """Where the first weights come from, and what may differ from the model."""

    path: str | None
    checkpoint: Literal["best", "last"]
    missing: list[str]
    unexpected: list[str]


@dataclass(frozen=True)
class SearchSettings:
    """How a search chooses settings, stops bad trials and ends; see `trainkit.sweeps.search.worker`."""

    trials: Count | None
    minutes: Positive | None
    epochs: Count | None
    sampler: Literal["tpe", "random", "grid", "cmaes", "qmc", "gp"]
    pruner: Literal["asha", "hyperband", "median", "percentile", "patient", "wilcoxon"] | None
    seed: Annotated[int, Range(minimum=0, below=2**32)]
    seeds: Count
    min_epochs: Count
    max_epochs: Count | None
    reduction: Annotated[int, Range(minimum=2)]
    percentile: Annotated[float, Range(above=0, below=100)]
    patience: Count
    storage: str | None


@dataclass(frozen=True)
class RootKeys:
    """The keys at the root of a config."""

    model: Node
    data: DataSettings
    loss: Node
    optim: Annotated[dict[str, Node], OneOrNamed()]
    scheduler: Annotated[dict[str, Node], OneOrNamed(optional=True)]
    param_groups: dict[str, Node]
    metrics: dict[str, Node]
    logger: dict[str, Node]
    lr: Annotated[float, Range(minimum=0)] | None
    epochs: Count | None
    steps: Count | None
    steps_per_epoch: Count | None
    max_minutes: Positive | None
    batch_size: Count
    val_batch_size: Count
    micro_batch: Count | None
    sync_batchnorm: Literal["auto"] | None
    activation_checkpointing: Literal["blocks"] | None
    training_step: str | Node
    evaluation_step: str | Node | None
    seed: Annotated[int, Range(minimum=0, below=2**63)]
    device: Annotated[str, Pattern(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:N or mps")]
    devices: Literal["all"] | Count
    distributed: Literal["auto", "ddp", "fsdp"]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    memory_format: Literal["auto", "contiguous", "channels_last"]
    compile: Literal[True, "default", "reduce-overhead", "max-autotune"] | None
    deterministic: bool | None
    clip_norm: Positive | None
    clip_value: Positive | None
    ema: Annotated[float, Range(above=0, below=1)] | None
    on_oom: Literal["auto", "split", "stop"]
    on_nonfinite: Literal["stop", "skip", "rollback"]
    limit_batches: Count | None
    limit_val_batches: Count | None
    watch: list[str]
    hooks: dict[str, Node]
    progress: Literal["auto", "rich", "tqdm", "plain", "off"]
    report: Literal["auto", "on", True] | None
    fail_fast: bool | None
    retries: Annotated[int, Range(minimum=0)]
    search: SearchSettings
    monitor: MonitorSettings
    init_from: InitFromSettings | None
    early_stop: EarlyStopSettings | None
    checkpoint: CheckpointSettings | None

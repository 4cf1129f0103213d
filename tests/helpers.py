"""What several test files share: small models, losses with data, data sets, and ways to train them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from trainkit import data
from trainkit.build import session as build
from trainkit.config.compose import compose_run
from trainkit.config.settings import Settings
from trainkit.data.loaders import Loader, make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store
from trainkit.training.loop import fit
from trainkit.training.state import LoopSettings, State, new_state

CPU = torch.device("cpu")


SAMPLES = 47

# The start of a module with a hook that kills its process after a step.
KILL_MODULE = """
import os, signal

class Kill:
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def compose_settings(overrides: Sequence[str]) -> Settings:
    """Return the settings that `trainkit OVERRIDES` trains."""
    return compose_run(overrides).settings


def make_state(model: nn.Module, loss_fn: nn.Module, lr: float = 0.0, **more: Any) -> State:
    """Return the state of a training of a model, its metric `train/loss`."""
    more.setdefault("monitor", "train/loss")
    optimizer = more.pop("optimizer", None) or torch.optim.SGD(
        [{"params": list(model.parameters()), "name": "default"}], lr=lr
    )
    watch = more.pop("watch", None)
    return new_state(model, loss_fn, optimizer, CPU, LoopSettings(**{"epochs": 1, **more}), watch=watch)


def only_optimizer(state: State) -> torch.optim.Optimizer:
    """Return the optimizer of a state with a single optimizer."""
    assert isinstance(state.objects.optimizer, torch.optim.Optimizer)
    return state.objects.optimizer


def make_loader_of(inputs: Tensor, targets: Tensor, batch_size: int, seed: int | None = 0) -> Loader:
    """Return a loader over two tensors."""
    return make_loader(Store.of(TensorDataset(inputs, targets)), Prepare(CPU), batch_size=batch_size, seed=seed)


def loss_case(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Return a model, a loss, inputs and targets that fit each other; losses differ a lot between samples."""
    torch.manual_seed(3)
    inputs = torch.randn(SAMPLES, 6) * torch.arange(1, SAMPLES + 1)[:, None] / 8
    classes = torch.randint(0, 5, (SAMPLES,))
    weights = torch.tensor([0.1, 3.0, 1.0, 0.5, 7.0])
    ignored = classes.clone()
    ignored[torch.arange(SAMPLES) % 3 == 0] = -100
    ignored[:8] = -100  # whole batches of nothing but ignored targets
    spatial = torch.randint(0, 5, (SAMPLES, 2, 3))
    spatial[torch.rand(spatial.shape) < 0.4] = 1
    linear = nn.Linear(6, 5)
    pixels = nn.Sequential(nn.Linear(6, 30), nn.Unflatten(1, (5, 2, 3)))
    image = nn.Sequential(nn.Linear(6, 24), nn.Unflatten(1, (2, 3, 4)))
    return {
        "cross entropy": (linear, nn.CrossEntropyLoss(), inputs, classes),
        "class weights": (linear, nn.CrossEntropyLoss(weight=weights), inputs, classes),
        "ignore_index": (linear, nn.CrossEntropyLoss(), inputs, ignored),
        "custom ignore_index": (linear, nn.CrossEntropyLoss(ignore_index=2), inputs, classes),
        "weights and ignore_index": (linear, nn.CrossEntropyLoss(weight=weights), inputs, ignored),
        "label smoothing": (
            linear,
            nn.CrossEntropyLoss(weight=weights, label_smoothing=0.2),
            inputs,
            ignored,
        ),
        "reduction sum": (linear, nn.CrossEntropyLoss(reduction="sum"), inputs, classes),
        "weighted sum": (linear, nn.CrossEntropyLoss(weight=weights, reduction="sum"), inputs, ignored),
        "probabilities": (
            linear,
            nn.CrossEntropyLoss(weight=weights),
            inputs,
            torch.rand(SAMPLES, 5).softmax(1),
        ),
        "pixels": (pixels, nn.CrossEntropyLoss(ignore_index=1), inputs, spatial),
        "weighted pixels": (pixels, nn.CrossEntropyLoss(weight=weights, ignore_index=1), inputs, spatial),
        "a class of weight 0": (
            linear,
            nn.CrossEntropyLoss(weight=weights * (weights != 3)),
            inputs,
            classes,
        ),
        "nll": (nn.Sequential(linear, nn.LogSoftmax(1)), nn.NLLLoss(weight=weights), inputs, ignored),
        "mse": (linear, nn.MSELoss(), inputs, torch.randn(SAMPLES, 5)),
        "mse of images": (image, nn.MSELoss(), inputs, torch.randn(SAMPLES, 2, 3, 4)),
        "mse sum": (image, nn.MSELoss(reduction="sum"), inputs, torch.randn(SAMPLES, 2, 3, 4)),
        "l1": (image, nn.L1Loss(), inputs, torch.randn(SAMPLES, 2, 3, 4)),
        "smooth l1": (linear, nn.SmoothL1Loss(), inputs, torch.randn(SAMPLES, 5)),
        "bce": (linear, nn.BCEWithLogitsLoss(pos_weight=weights), inputs, torch.rand(SAMPLES, 5)),
    }[name]


def loss_in_float64(model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the loss of the whole set in float64; a sum is divided by the number of samples."""
    targets = targets.double() if targets.is_floating_point() else targets
    value = copy.deepcopy(loss_fn).double()(copy.deepcopy(model).double()(inputs.double()), targets)
    return float(value.detach()) / (len(inputs) if getattr(loss_fn, "reduction", None) == "sum" else 1)


class MetricsCollector:
    """A hook that collects the metrics of each epoch."""

    def __init__(self, seen: list[dict[str, Any]]) -> None:
        self.seen = seen

    def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:  # noqa: ARG002
        self.seen.append(metrics)


STEPS = 6  # of an epoch of `small_run`


PLAIN_SGD = ["optim=sgd", "optim.momentum=0.9", "+optim.fused=false"]


class SmallCNN(nn.Module):
    """Two convolutions and a linear layer; `gain` makes the gradient large, for fp16 to overflow."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=4)
        self.body = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(512, 10)

    def maps(self, images: Tensor) -> Tensor:
        """(N, 8, 8, 8)."""
        maps: Tensor = self.body(self.conv(images).relu())
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.maps(images).flatten(1)) * self.gain
        return logits


def small_run(model: type[nn.Module], *more: str, **arguments: Any) -> list[str]:
    """Return the overrides that train a model on the digits for one short epoch."""
    target = f"{model.__module__}.{model.__name__}"
    own = ["model=toy_cnn", f"model._target_={target}", "~model.in_channels", "~model.num_classes"]
    given = [f"+model.{key}={value}" for key, value in arguments.items()]
    return [*own, *given, f"limit_batches={STEPS}", "epochs=1", "data.split=off", "progress=off", *more]


def train_session(overrides: list[str], hooks: list[Any] | None = None) -> build.Session:
    """Train a config in this process; return its session."""
    session = build.build_session(compose_settings(overrides))
    fit(session.state, session.train, session.val, hooks)
    return session


def assert_close(one: build.Session, other: build.Session, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Check that two sessions have the same weights within a tolerance."""
    for a, b in zip(one.state.objects.model.parameters(), other.state.objects.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


COUNT = 45  # samples of the small data sets below


IMAGES, LABELS = data.synthetic(size=COUNT, shape=[3, 8, 6], classes=3).tensors


ReadSample = Callable[[int], Any]


class ItemDataset:
    """A data set whose samples come from a function; counts the reads."""

    def __init__(self, read: ReadSample, count: int = COUNT) -> None:
        self.read, self.count, self.reads = read, count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.read(index)


def unreadable_samples(*lost: int) -> ReadSample:
    """Return a reader whose samples `lost` raise an OSError."""

    def read(index: int) -> Any:
        if index in lost:
            raise OSError("truncated")
        return IMAGES[index], int(LABELS[index])

    return read


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history."""
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def files_in(folder: Path) -> list[str]:
    """Return the paths of the files and links in a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def thinned(names: Iterable[Any], keep: int) -> list[Any]:
    """Return the parameters of a test. Every `keep`-th runs with the fast tests; the others are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (number % keep > 0)) for number, name in enumerate(names)]


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of a size, such as `3m`, for the block; skip the test if this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only who may mount can have a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)

"""Data sets that give a sample at a time: a loop by hand against trainkit, with 0 and 2 processes that read.

    python -m benchmarks.reading [--samples 10000] [--epochs 6] [--kinds mappings drawn] [--data FILE.npz]

Where data lies in tensors there is nothing to compare; here each sample is asked for. Most of these are so small
that what a loader costs is nearly all there is. Ratios are of the medians, over the loop by hand.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import loops
from benchmarks.contest import Job, Lane, Lap, images, machine, race, table


class Rows(Dataset[Any]):
    """Rows of 16 numbers, and one of 4 classes.

    Args:
        samples: how many.
        kind: what is made of a row.
    """

    def __init__(self, samples: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 16, generator=generator)
        self.y = torch.randint(0, 4, (samples,), generator=generator).tolist()
        self.kind = kind

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row, target = self.x[index], self.y[index]
        if self.kind == "mappings":
            return {"row": row, "shift": row[:1]}, target
        return row + 0.1 * torch.randn(16) if self.kind == "drawn" else row, target


class Net(nn.Module):
    """Two layers, for rows or mappings of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, inputs: Any) -> Tensor:
        rows = inputs["row"] + inputs["shift"] if isinstance(inputs, dict) else inputs
        logits: Tensor = self.last(torch.relu(self.first(rows)))
        return logits


class Images(Dataset[Any]):
    """Images of PIL, moved and flipped at random by torchvision."""

    def __init__(self, data: str) -> None:
        from torchvision import transforms as t

        with np.load(data) as arrays:
            self.x, self.y = arrays["X"].transpose(0, 2, 3, 1).copy(), arrays["y"].tolist()
        self.change = t.Compose([t.RandomCrop(32, 4), t.RandomHorizontalFlip(), t.ToTensor()])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.change(Image.fromarray(self.x[index])), self.y[index]


KINDS: dict[str, tuple[str, str]] = {
    "mappings": ("mappings of two rows", "auto"),
    "streamed": ("rows, as of a set that fits into no memory", "none"),
    "drawn": ("rows with noise from torch's generator", "auto"),
    "images": ("images changed by torchvision", "auto"),
}


def dataset(kind: str, samples: int, data: str) -> Any:
    """What both loops read."""
    return Images(data) if kind == "images" else Rows(samples, kind)


def by_hand(job: Job, lap: Lap, *, kind: str, samples: int, workers: int) -> None:
    """The tutorial's loop with `DataLoader`."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has children
    data = dataset(kind, samples, job.data)
    torch.manual_seed(job.seed)
    model = loops.toy_cnn(job) if kind == "images" else Net()
    order = loops.Shuffled(len(data), job.seed)
    loader = DataLoader(data, job.batch_size, sampler=order, num_workers=workers, persistent_workers=workers > 0)
    if workers:
        for _ in loader:  # the processes start
            pass
        order.epoch = 0
    loops.by_hand(job, lap, model, loader)


def trainkit(job: Job, lap: Lap, *, kind: str, samples: int, workers: int) -> None:
    """The same from a config."""
    import trainkit

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    loops._lap = lap
    model = "trainkit.models.ToyCNN" if kind == "images" else "benchmarks.reading.Net"
    config = Path("conf")
    made = f"_target_: benchmarks.reading.dataset, kind: {kind}, samples: {samples}, data: {job.data}"
    for group, text in (("data", f"train: {{{made}}}"), ("model", f"_target_: {model}")):
        (config / group).mkdir(parents=True)
        (config / group / "raced.yaml").write_text(text + "\n")
    chosen = ["model=raced", "data=raced", "data.split=off", f"data.num_workers={workers}", "optim=sgd"]
    keys = {"batch_size": job.batch_size, "epochs": job.epochs, "lr": job.lr, "data.cache": KINDS[kind][1]}
    hook = "+hooks.lap._target_=benchmarks.loops.Announce"
    trainkit.train(trainkit.compose([*chosen, *(f"{key}={value}" for key, value in keys.items()), hook]))


def main() -> None:
    """Race, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--data", help="an .npz file with X (N, 3, 32, 32) uint8 and y")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = images(min(args.samples, 2000), args.data and str(Path(args.data).resolve()), Path(folder))
        for kind in args.kinds:
            samples = 2000 if kind == "images" else args.samples
            for workers in (0, 2):
                job, of = Job(data, 32, args.epochs), {"kind": kind, "samples": samples, "workers": workers}
                lanes = race(
                    [Lane("by hand", partial(by_hand, **of), job), Lane("trainkit", partial(trainkit, **of), job)]
                )
                first = lanes["by hand"]
                for name, lane in lanes.items():
                    off = max(abs(mine - its) / its for mine, its in zip(lane.losses, first.losses, strict=True))
                    cells = [f"{samples / lane.median:,.0f}", f"{first.median / lane.median:.2f}", f"{off:.1e}"]
                    rows.append([KINDS[kind][0], str(workers), name, *cells])
    print(f"{machine()}; {args.samples:,} samples, {args.epochs} epochs\n")
    print(table(["data set", "processes", "loop", "samples/s", "ratio", "loss differs by"], rows))


if __name__ == "__main__":
    main()

"""Compare trainkit with a loop by hand on data sets that are read sample by sample, with 0 and 2 worker processes.

    python -m benchmarks.reading [--samples 10000] [--epochs 6] [--kinds mappings drawn] [--data FILE.npz]

Most models and samples here are so small that the loader takes nearly all of the time. A ratio compares trainkit
with the loop by hand in the same turn; the table has the median and the quartiles.
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
from benchmarks.interleave import (
    Entry,
    Job,
    Reporter,
    describe_machine,
    make_images_file,
    markdown_table,
    run_interleaved,
)


class Rows(Dataset[Any]):
    """Rows of 16 numbers with one of 4 classes.

    Args:
        samples: the number of rows.
        kind: a key of `KINDS`.
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
    """A network of two layers for rows or mappings of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, inputs: Any) -> Tensor:
        rows = inputs["row"] + inputs["shift"] if isinstance(inputs, dict) else inputs
        logits: Tensor = self.last(torch.relu(self.first(rows)))
        return logits


class Images(Dataset[Any]):
    """PIL images, shifted and flipped at random by torchvision."""

    def __init__(self, data: str) -> None:
        from torchvision import transforms as t

        with np.load(data) as arrays:
            self.x, self.y = arrays["X"].transpose(0, 2, 3, 1).copy(), arrays["y"].tolist()
        self.transform = t.Compose([t.RandomCrop(32, 4), t.RandomHorizontalFlip(), t.ToTensor()])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.x[index])), self.y[index]


KINDS: dict[str, tuple[str, str]] = {  # kind -> its description and its data.cache
    "mappings": ("mappings of two rows", "auto"),
    "streamed": ("rows that are not cached", "none"),
    "drawn": ("rows with noise from torch's generator", "auto"),
    "images": ("images changed by torchvision", "auto"),
}


def make_dataset(kind: str, samples: int, data: str) -> Any:
    """Return the data set that both loops read."""
    return Images(data) if kind == "images" else Rows(samples, kind)


def _allow_worker_processes() -> None:
    """Let this process start worker processes, which Python forbids in daemons."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def by_hand(job: Job, report: Reporter, *, kind: str, samples: int, workers: int) -> None:
    """Train with the tutorial's loop and `DataLoader`."""
    _allow_worker_processes()
    data = make_dataset(kind, samples, job.data)
    torch.manual_seed(job.seed)
    model = loops.make_model(job) if kind == "images" else Net()
    order = loops.TrainkitSampler(len(data), job.seed)
    loader = DataLoader(data, job.batch_size, sampler=order, num_workers=workers, persistent_workers=workers > 0)
    if workers:
        for _ in loader:  # starts the worker processes
            pass
        order.epoch = 0
    loops.train_by_hand(job, report, model, loader)


def trainkit(job: Job, report: Reporter, *, kind: str, samples: int, workers: int) -> None:
    """Train the same from a config."""
    import trainkit

    _allow_worker_processes()
    loops.set_reporter(report)
    model = "trainkit.models.ToyCNN" if kind == "images" else "benchmarks.reading.Net"
    config = Path("conf")
    node = f"_target_: benchmarks.reading.make_dataset, kind: {kind}, samples: {samples}, data: {job.data}"
    for group, text in (("data", f"train: {{{node}}}"), ("model", f"_target_: {model}")):
        (config / group).mkdir(parents=True)
        (config / group / "compared.yaml").write_text(text + "\n")
    chosen = ["model=compared", "data=compared", "data.split=off", f"data.num_workers={workers}", "optim=sgd"]
    keys = {"batch_size": job.batch_size, "epochs": job.epochs, "lr": job.lr, "data.cache": KINDS[kind][1]}
    hook = "+hooks.report._target_=benchmarks.loops.ReportEpochs"
    trainkit.train(trainkit.compose([*chosen, *(f"{key}={value}" for key, value in keys.items()), hook]))


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--data", help="an .npz file with X (N, 3, 32, 32) uint8 and y")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_images_file(min(args.samples, 2000), args.data and str(Path(args.data).resolve()), Path(folder))
        for kind in args.kinds:
            samples = 2000 if kind == "images" else args.samples
            for workers in (0, 2):
                job, options = Job(data, 32, args.epochs), {"kind": kind, "samples": samples, "workers": workers}
                named_loops = {"by hand": by_hand, "trainkit": trainkit}
                entries = run_interleaved(
                    Entry(name, partial(loop, **options), job) for name, loop in named_loops.items()
                )
                reference = entries["by hand"]
                for name, entry in entries.items():
                    speed, difference = f"{samples / entry.median:,.0f}", f"{entry.loss_difference(reference):.1e}"
                    rows.append([KINDS[kind][0], str(workers), name, speed, entry.ratio(reference), difference])
    print(f"{describe_machine()}; {args.samples:,} samples, {args.epochs} epochs\n")
    print(markdown_table(["data set", "processes", "loop", "samples/s", "ratio", "loss differs by"], rows))


if __name__ == "__main__":
    main()

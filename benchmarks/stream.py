"""Compare trainkit on a stream with a hand-written `DataLoader` over the same iterable: speed, and memory.

    python -m benchmarks.stream [--samples 64000] [--epochs 8] [--memory 1000000]

Both loops have their own process and take turns, an epoch each. `--memory N` then reads N samples of the stream, and
prints how much memory the second half of them added.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.interleave import Entry, Job, Reporter, describe_machine, markdown_table, run_interleaved

FEATURES = 64


class Lines(IterableDataset[Any]):
    """Yields samples of JSON lines: little work, so that the loader's own work is a large part of a step."""

    def __init__(self, size: int, *, stateful: bool = False) -> None:
        self.size, self.used = size, 0
        if stateful:
            self.state_dict = lambda: {"used": self.used}
            self.load_state_dict = lambda state: self.__dict__.update(state)

    def __iter__(self) -> Iterator[Any]:
        table = torch.randn(256, FEATURES, generator=torch.Generator().manual_seed(0)).tolist()
        lines = [json.dumps({"x": row, "y": number % 10}) for number, row in enumerate(table)]
        while self.used < self.size:
            self.used += 1
            sample = json.loads(lines[self.used % 256])
            yield torch.tensor(sample["x"]), sample["y"]


def network() -> nn.Module:
    """Return the model of both loops."""
    return nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def by_hand(job: Job, report: Reporter) -> None:
    """Train as a tutorial does, over a `DataLoader`."""
    torch.manual_seed(job.seed)
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr)
    report()
    for _ in range(job.epochs):
        total = torch.zeros(())
        for inputs, targets in DataLoader(Lines(int(job.data)), batch_size=job.batch_size):
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(inputs)
        report(float(total) / int(job.data))


def with_trainkit(job: Job, report: Reporter, *, stateful: bool = False) -> None:
    """Train with trainkit's loop."""
    from trainkit.build.session import build_session
    from trainkit.config.compose import compose_run
    from trainkit.training.loop import fit

    class Report:
        def on_epoch_end(self, _: Any, metrics: dict[str, Any]) -> None:
            report(metrics["train/loss"])

    data = f"{{_target_: benchmarks.stream.Lines, size: {job.data}, stateful: {stateful}}}"
    overrides = [
        f"data.train={data}",
        "data.split=off",
        "data.normalize=off",
        "model._target_=benchmarks.stream.network",
    ]
    overrides += [f"steps_per_epoch={-(-int(job.data) // job.batch_size)}", f"epochs={job.epochs}", f"lr={job.lr}"]
    session = build_session(compose_run([*overrides, f"batch_size={job.batch_size}", "device=cpu"]).settings)
    report()
    fit(session.state, session.train, None, [Report()])


def with_state(job: Job, report: Reporter) -> None:
    """Train with trainkit's loop on a stream with a `state_dict`."""
    with_trainkit(job, report, stateful=True)


def memory_of_second_half(samples: int) -> float:
    """Return how many MiB the second half of the samples of a stream adds to the peak of this process."""
    from trainkit.data.prepare import Prepare
    from trainkit.data.stream_loader import StreamLoader
    from trainkit.data.streams import Stream

    stream = Stream(Lines(samples, stateful=True), "data.train", None)
    peaks = []
    loader = StreamLoader(stream, Prepare(torch.device("cpu")), batch_size=100, steps=samples // 200)
    for epoch in range(2):
        for _ in loader.batches(epoch):
            pass
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks[1] - peaks[0]


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=64_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--memory", type=int, default=1_000_000)
    args = parser.parse_args()
    rows = []
    loops = {"DataLoader by hand": by_hand, "trainkit": with_trainkit, "trainkit, with a state_dict": with_state}
    for batch_size in (32, 256):
        job = Job(str(args.samples), batch_size, args.epochs)
        entries = run_interleaved([Entry(name, loop, job) for name, loop in loops.items()])
        reference = next(iter(entries.values()))
        for name, entry in entries.items():
            speed, difference = f"{args.samples / entry.median:,.0f}", f"{entry.loss_difference(reference):.1e}"
            rows.append([str(batch_size), name, speed, entry.ratio(reference), difference])
    print(f"{describe_machine()}; a stream of {args.samples:,} samples, {args.epochs} epochs\n")
    print(markdown_table(["batch", "loop", "samples/s", "ratio", "loss differs by"], rows))
    added = memory_of_second_half(args.memory)
    print(f"\nThe second half of {args.memory:,} samples adds {added:.1f} MiB to the peak of the memory.")


if __name__ == "__main__":
    main()

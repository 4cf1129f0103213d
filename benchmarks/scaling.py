"""Measure the time per sample and the memory of a training as the data set grows.

    python -m benchmarks.scaling [--sizes 1000 10000 100000 1000000] [--steps 400]

Each size has its own process, and the processes take turns of some steps each. The memory is the peak of a process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from functools import partial
from time import perf_counter

from benchmarks.interleave import Entry, Job, Reporter, describe_machine, markdown_table, run_interleaved

SAMPLE = 3 * 32 * 32  # bytes


def train_rounds(job: Job, report: Reporter, *, size: int, steps: int) -> None:
    """Train `steps` steps in each round (epoch of the job); report the seconds per sample.

    The last round trains nothing. It reports the peak memory instead.
    """
    from trainkit.build.session import build_session
    from trainkit.config.compose import compose_run
    from trainkit.diagnostics.batches import FixedStepsLoader
    from trainkit.diagnostics.phases import run_trainkit_loop

    chosen = ["data=synthetic", f"data.train.size={size}", "data.split=off", f"batch_size={job.batch_size}"]
    session = build_session(compose_run(chosen).settings, lambda *_: None)
    loader = FixedStepsLoader(session.train, steps)
    report()
    for _ in range(job.epochs - 1):
        began = perf_counter()
        samples = run_trainkit_loop(session.state, loader)
        report((perf_counter() - began) / samples)
    report(peak_memory())


def peak_memory() -> float:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    job = Job("", 32, args.rounds + 2)
    entries = run_interleaved(
        Entry(str(size), partial(train_rounds, size=size, steps=args.steps), job) for size in args.sizes
    )
    # The first round is a warm-up, and the last reports the memory.
    seconds = [statistics.median(entry.losses[1:-1]) for entry in entries.values()]
    memory = [entry.losses[-1] / 2**20 for entry in entries.values()]
    reference = seconds[min(1, len(seconds) - 1)]
    rows = []
    for size, spent, used in zip(args.sizes, seconds, memory, strict=True):
        images = (size - args.sizes[0]) * SAMPLE / 2**20
        times = [f"{spent * 1e6:.1f}", f"{spent / reference:.3f}"]
        rows.append([f"{size:,}", *times, f"{used:,.0f}", f"{used - memory[0]:,.0f}", f"{images:,.0f}"])
    print(f"{describe_machine()}; medians of {args.rounds} rounds of {args.steps} steps of 32\n")
    head = [
        "samples",
        "µs a sample",
        "over the second",
        "MiB in all",
        "MiB over the first",
        "its images over the first's",
    ]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()

"""What a sample costs, and how much memory a training takes, as the data set grows.

    python -m benchmarks.scaling [--sizes 1000 10000 100000 1000000] [--steps 400]

Each size has a process of its own and they take turns, so many steps each; memory is the most that a process
has held.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from time import perf_counter

from benchmarks.contest import Job, Lane, Lap, machine, race, table

SAMPLE = 3 * 32 * 32  # bytes


def some_steps(job: Job, lap: Lap) -> None:
    """Rounds of so many steps on a synthetic set: reports the seconds of a sample, and in the last round the memory.

    `job.data` is the size of the set and overrides, `job.precision` the number of steps.
    """
    from trainkit.build import session as build
    from trainkit.config.compose import compose_run
    from trainkit.diagnostics.batches import FixedStepsLoader
    from trainkit.diagnostics.phases import run_trainkit_loop

    size, *overrides = job.data.split()
    chosen = ["data=synthetic", f"data.train.size={size}", "data.split=off", f"batch_size={job.batch_size}"]
    session = build.build_session(compose_run([*chosen, *overrides]).settings, lambda *_: None)
    few = FixedStepsLoader(session.train, int(job.precision))
    lap()
    for _ in range(job.epochs - 1):
        began = perf_counter()
        seen = run_trainkit_loop(session.state, few)
        lap((perf_counter() - began) / seen)
    lap(memory())


def memory() -> float:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    lanes = [
        Lane(f"{size:,}", some_steps, Job(str(size), 32, args.rounds + 2, precision=str(args.steps)))
        for size in args.sizes
    ]
    found = race(lanes)
    seconds = {name: statistics.median(lane.losses[1:-1]) for name, lane in found.items()}  # the first round warms up
    held = {name: lane.losses[-1] / 2**20 for name, lane in found.items()}
    first, reference = f"{args.sizes[0]:,}", seconds[f"{args.sizes[min(1, len(args.sizes) - 1)]:,}"]
    rows = []
    for size in args.sizes:
        name = f"{size:,}"
        own = (size - args.sizes[0]) * SAMPLE / 2**20
        spent = [f"{seconds[name] * 1e6:.1f}", f"{seconds[name] / reference:.3f}"]
        rows.append([name, *spent, f"{held[name]:,.0f}", f"{held[name] - held[first]:,.0f}", f"{own:,.0f}"])
    print(f"{machine()}; medians of {args.rounds} rounds of {args.steps} steps of 32\n")
    head = [
        "samples",
        "µs a sample",
        "over the second",
        "MiB in all",
        "MiB over the first",
        "its images over the first's",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()

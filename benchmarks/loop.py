"""The tutorial's loop by hand against trainkit: samples a second, fp32 and bf16, batches of 32 and 256.

    python -m benchmarks.loop [--samples 5000] [--epochs 8] [--data FILE.npz]

Every loop has a process of its own and they take turns, an epoch each. Ratios are of the medians, over the
tutorial's loop at the same batch size. The losses of the first epochs are compared, too.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import loops
from benchmarks.contest import Job, Lane, images, machine, race, table


def main() -> None:
    """Race, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--data", help="an .npz file with X (N, 3, 32, 32) uint8 and y")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = images(args.samples, args.data and str(Path(args.data).resolve()), Path(folder))
        for batch_size in args.batch_sizes:
            job = Job(data, batch_size, args.epochs)
            bf16 = replace(job, precision="bf16")
            lanes = race(
                [
                    Lane("the tutorial's loop", loops.tutorial, job),
                    Lane("bare script, fp32", loops.bare, job),
                    Lane("trainkit's parts in a bare loop, fp32", loops.same_parts, job),
                    Lane("trainkit, fp32", loops.trainkit, job),
                    Lane("bare script, bf16", loops.bare, bf16),
                    Lane("trainkit's parts in a bare loop, bf16", loops.same_parts, bf16),
                    Lane("trainkit, bf16", loops.trainkit, bf16),
                ]
            )
            first = lanes["the tutorial's loop"]
            for name, lane in lanes.items():
                off = max(abs(mine - its) / its for mine, its in zip(lane.losses, first.losses, strict=True))
                speed = args.samples / lane.median
                rows.append([str(batch_size), name, f"{speed:,.0f}", f"{first.median / lane.median:.2f}", f"{off:.1e}"])
    print(f"{machine()}; {args.samples:,} images, {args.epochs} epochs\n")
    print(table(["batch", "loop", "samples/s", "ratio", "loss differs by"], rows))


if __name__ == "__main__":
    main()

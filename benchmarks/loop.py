"""Compare trainkit with the loop of the tutorials: samples per second, fp32 and bf16, batches of 32 and 256.

    python -m benchmarks.loop [--samples 5000] [--epochs 8] [--data FILE.npz]

Each loop has its own process, and the loops take turns, an epoch each. A ratio compares a loop with the
tutorial's in the same turn; the table has the median and the quartiles. The losses of all epochs are compared too.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import loops
from benchmarks.interleave import Entry, Job, describe_machine, make_images_file, markdown_table, run_interleaved


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--data", help="an .npz file with X (N, 3, 32, 32) uint8 and y")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_images_file(args.samples, args.data and str(Path(args.data).resolve()), Path(folder))
        for batch_size in args.batch_sizes:
            job = Job(data, batch_size, args.epochs)
            bf16 = replace(job, precision="bf16")
            entries = run_interleaved(
                [
                    Entry("the tutorial's loop", loops.tutorial, job),
                    Entry("bare script, fp32", loops.bare_script, job),
                    Entry("trainkit's parts in a bare loop, fp32", loops.trainkit_objects, job),
                    Entry("trainkit, fp32", loops.trainkit, job),
                    Entry("bare script, bf16", loops.bare_script, bf16),
                    Entry("trainkit's parts in a bare loop, bf16", loops.trainkit_objects, bf16),
                    Entry("trainkit, bf16", loops.trainkit, bf16),
                ]
            )
            reference = entries["the tutorial's loop"]
            for name, entry in entries.items():
                speed, difference = f"{args.samples / entry.median:,.0f}", f"{entry.loss_difference(reference):.1e}"
                rows.append([str(batch_size), name, speed, entry.ratio(reference), difference])
    print(f"{describe_machine()}; {args.samples:,} images, {args.epochs} epochs\n")
    print(markdown_table(["batch", "loop", "samples/s", "ratio", "loss differs by"], rows))


if __name__ == "__main__":
    main()

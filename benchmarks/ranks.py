"""Compare trainings on several ranks with trainings in one process: samples per second on the CPU.

    python -m benchmarks.ranks [--jobs default tiny resnet18] [--compare overhead ranks] [--epochs 8]

Each lane is a training under torchrun, or in one process, and the lanes take turns, an epoch each. A ratio compares
two lanes in the same turn. The table shows the median of the ratios, with their quartiles. The twin of a lane shows
how much equal trainings differ.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.interleave import Entry, Job, Reporter, describe_machine, markdown_table, run_interleaved

PORT, OVERRIDES = "BENCHMARK_PORT", "BENCHMARK_OVERRIDES"  # variables of the processes of a lane
JOBS = {
    "default": ["limit_batches=20"],
    "tiny": ["model=mlp", "model.hidden=[8]", "data=synthetic", "data.train.shape=[16]", "data.train.size=6400"],
    "resnet18": [
        "model=torchvision",
        "model.name=resnet18",
        "data=synthetic",
        "data.train.shape=[3,64,64]",
        "data.train.size=256",
    ],
}
PLAIN, TWIN = "1 process, 1 thread", "1 process, 1 thread (twin)"
UNDER_TORCHRUN = "1 rank under torchrun, 1 thread"
TWO_THREADS, TWO_RANKS = "1 process, 2 threads", "2 ranks, 1 thread each"
LANES = {  # name -> the number of ranks, the threads of each; 0 ranks: without torchrun
    PLAIN: (0, 1),
    TWIN: (0, 1),
    UNDER_TORCHRUN: (1, 1),
    TWO_THREADS: (0, 2),
    TWO_RANKS: (2, 1),
}
COMPARED = {  # name -> pairs of lanes
    "overhead": [(TWIN, PLAIN), (UNDER_TORCHRUN, PLAIN)],
    "ranks": [(TWO_THREADS, PLAIN), (TWO_RANKS, PLAIN), (TWO_RANKS, TWO_THREADS)],
}


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--compare", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    pairs = [pair for name in args.compare for pair in COMPARED[name]]
    used = {lane for pair in pairs for lane in pair}
    rows = []
    for name in args.jobs:
        job = Job("", 32, args.epochs + 1)
        lanes = (
            Entry(lane, partial(train_lane, overrides=JOBS[name], ranks=ranks, threads=threads), job)
            for lane, (ranks, threads) in LANES.items()
            if lane in used
        )
        entries = run_interleaved(lanes)
        for lane, reference in pairs:
            difference = entries[lane].loss_difference(entries[reference])
            rows.append([name, lane, reference, entries[lane].ratio(entries[reference]), f"{difference:.1e}"])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{describe_machine()}; medians of {args.epochs} epochs (quartiles); load of the machine {load}\n")
    print(markdown_table(["job", "lane", "compared with", "speed", "loss differs by"], rows))


# ------------------------------------------------------------------------------------------ a lane


def train_lane(job: Job, report: Reporter, *, overrides: list[str], ranks: int, threads: int) -> None:
    """Start the processes of a lane, and pass the reports of its first rank on.

    Args:
        job: the number of its epochs.
        report: see `benchmarks.interleave`.
        overrides: the config.
        ranks: the number of ranks under torchrun; 0: one process without torchrun.
        threads: of each process.
    """
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks else []
    words = [*overrides, f"epochs={job.epochs}", f"batch_size={job.batch_size}", f"seed={job.seed}", "progress=off"]
    with socket.create_server(("localhost", 0)) as server, tempfile.TemporaryFile("w+") as errors:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            PORT: str(server.getsockname()[1]),
            OVERRIDES: "\n".join([*words, "+hooks.report._target_=benchmarks.ranks.ReportEpochs"]),
        }
        command = [sys.executable, "-m", *launcher, "benchmarks.ranks_worker"]
        process = subprocess.Popen(command, env=env, stdout=errors, stderr=errors)
        try:
            connection = accept(server, process)
            while True:
                report(connection.recv())
                connection.send("continue")
        except EOFError:
            errors.seek(0)
            raise RuntimeError(errors.read()) from None


def accept(server: socket.socket, process: subprocess.Popen[bytes]) -> Connection:
    """Return the connection to the first rank of a lane.

    Raises:
        EOFError: the processes ended before.
    """
    server.settimeout(0.2)
    while process.poll() is None:
        with suppress(TimeoutError):
            return Connection(server.accept()[0].detach())
    raise EOFError


class ReportEpochs:
    """A hook of every rank, which reports each epoch on rank 0. The other ranks wait for rank 0 at their next step."""

    def __init__(self) -> None:
        is_first = os.environ.get("RANK", "0") == "0"
        self.reporter: Reporter | None = None
        if is_first:
            self.reporter = Reporter(
                Connection(socket.create_connection(("localhost", int(os.environ[PORT]))).detach())
            )

    def on_start(self, state: Any) -> None:  # noqa: ARG002
        """Report that the training is ready."""
        self.report(None)

    def on_epoch(self, state: Any, metrics: dict[str, Any]) -> None:  # noqa: ARG002
        """Report the loss of the epoch."""
        self.report(metrics["train/loss"])

    def report(self, loss: float | None) -> None:
        """Report on rank 0, and wait for the turn of this lane. End the process after the last turn."""
        try:
            if self.reporter is not None:
                self.reporter(loss)
        except (EOFError, ConnectionError):
            os._exit(0)


if __name__ == "__main__":
    main()

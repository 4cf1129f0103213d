"""Several ranks of a training, each with a hard timeout, so that a deadlock fails a test instead of hanging it.

`start_ranks` runs a command on each rank, without torchrun: the ranks are forks of a server that has imported torch,
with the variables that torchrun sets. `train_cases` trains many configs in one start. `torchrun` is the real launcher,
which takes several seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from tests.helpers import read_history
from tests.processes import Forks, Process
from trainkit.core.pytree import leaves

TIMEOUT = 240.0  # seconds; the machine may be busy


@dataclass
class Ended:
    """How the ranks of a command ended.

    Attributes:
        codes: the exit code of each rank; negative for a signal, such as -9 after the timeout.
        stdout: the text of each rank.
        stderr: the text of each rank.
    """

    codes: list[int]
    stdout: list[str]
    stderr: list[str]


@dataclass
class RunningRanks:
    """The ranks of a command that was started.

    Attributes:
        processes: one for each rank.
        stores: where the ranks find each other. They live as long as the ranks.
    """

    processes: list[Process]
    stores: list[TCPStore]

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end of all ranks; kill them after the timeout."""
        timer = threading.Timer(timeout, self._kill)
        timer.start()
        try:
            codes = [process.wait() for process in self.processes]
        finally:
            timer.cancel()
        self.stores.clear()
        return Ended(codes, [process.stdout for process in self.processes], [p.stderr for p in self.processes])

    def _kill(self) -> None:
        for process in self.processes:
            if process.code is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send(signal.SIGKILL)


def start_ranks(forks: Forks, ranks: int, *argv: str, cwd: Path, call: str | None = None, **env: str) -> RunningRanks:
    """Start `trainkit ARGV` on each rank. One rank is a plain process.

    Args:
        forks: the server.
        ranks: the number of ranks.
        argv: the arguments of the command.
        cwd: the working directory.
        call: the function that runs instead of the command, as `module:name`.
        env: more variables.
    """
    stores = [new_store()]
    processes = [
        forks.start(*argv, cwd=cwd, call=call, **rank_variables(rank, ranks, stores[0].port), **env)
        for rank in range(ranks)
    ]
    return RunningRanks(processes, stores)


def run_ranks(forks: Forks, ranks: int, *argv: str, cwd: Path, timeout: float = TIMEOUT, **env: str) -> Ended:
    """Run `trainkit ARGV` on each rank to its end, see `start_ranks`."""
    return start_ranks(forks, ranks, *argv, cwd=cwd, **env).wait(timeout)


def torchrun(ranks: int, *argv: str, cwd: Path, timeout: float = TIMEOUT, restarts: int = 0, **env: str) -> Ended:
    """Run `torchrun --nproc-per-node RANKS -m trainkit ARGV`; the result has one code, that of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command.append(f"--max-restarts={restarts}")
    process = subprocess.Popen(
        [*command, "-m", "trainkit", *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return Ended([process.returncode], [out], [err])


def new_store() -> TCPStore:
    """Return a store at which ranks find each other, on a free port."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank; none for one rank."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


# ------------------------------------------------------------------------------ many trainings in one start


@dataclass
class Case:
    """A training of `train_cases`.

    Attributes:
        overrides: the config.
        dtype: torch's default dtype, such as `float64`.
    """

    overrides: Sequence[str]
    dtype: str = "float32"


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        codes: the exit code on each rank; empty if the ranks ended before the case.
        errors: the causes and hints of the error on each rank.
        directory: of the run, with the history.
        states: what each rank had at the end: objects and progress; empty after an error.
    """

    codes: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    directory: Path = Path()
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the history."""
        return read_history(self.directory)


def train_cases(
    forks: Forks, ranks: int, cases: Mapping[str, Case], cwd: Path, timeout: float | None = None
) -> dict[str, Outcome]:
    """Train each case on the ranks, one after the other in the same processes; return how each ended.

    The cases find modules in `cwd`. The run of a case is in `cwd/RANKS/NAME`. A case that fails ends on every rank,
    or the timeout ends all ranks.
    """
    stores = {name: new_store() for name in cases}
    folder = cwd / str(ranks)
    folder.mkdir(exist_ok=True)
    content = {name: {**dataclasses.asdict(case), "port": stores[name].port} for name, case in cases.items()}
    (folder / "cases.json").write_text(json.dumps(content))
    started = start_ranks(
        forks, ranks, cwd=cwd, call="tests.distributed.worker:run_cases", CASES=str(folder / "cases.json")
    )
    ended = started.wait(timeout or TIMEOUT + 10 * ranks * len(cases))
    outcomes = {name: Outcome(directory=folder / name) for name in cases}
    for rank in range(ranks):
        file = folder / f"ended-{rank}.jsonl"
        for row in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            outcomes[row["name"]].codes.append(row["code"])
            outcomes[row["name"]].errors.append(row["error"])
        for name, outcome in outcomes.items():
            state = folder / f"{name}-{rank}.pt"
            if state.exists():
                outcome.states.append(torch.load(state, weights_only=False))
    missing = [name for name, outcome in outcomes.items() if len(outcome.codes) < ranks]
    assert not missing, f"{missing[0]} did not end on each of {ranks} ranks: {ended.codes}\n" + "\n".join(ended.stderr)
    return outcomes


def largest_difference(one: Any, other: Any) -> float:
    """Return the largest difference between two states, relative to the largest value of each tensor.

    Values that are no floats must be equal.
    """
    largest = 0.0
    ours, others = list(leaves(one)), list(leaves(other))
    if len(ours) != len(others):
        return float("inf")
    for a, b in zip(ours, others, strict=True):
        if type(a) is not type(b):
            return float("inf")
        if isinstance(a, Tensor) and a.is_sparse:
            a, b = a.to_dense(), b.to_dense()
        if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()):
            scale = max(float(b.abs().max()), 1e-300) if b.numel() else 1.0
            difference = float((a - b).abs().max()) / scale if a.numel() else 0.0
        elif isinstance(a, float):
            difference = 0.0 if a == b or (a != a and b != b) else abs(a - b) / max(abs(b), 1e-300)
        else:
            difference = 0.0 if (a.equal(b) if isinstance(a, Tensor) else a == b) else float("inf")
        largest = max(largest, difference)
    return largest

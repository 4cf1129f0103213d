"""Start the processes that train one model together, one for each device, and wait for their end.

The processes are ranks as torchrun would start them: `joined_ranks` reads the same environment variables. They are
forks of this process, so the config is composed once and torch is imported once.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from trainkit.core.errors import Problem, TrainkitError
from trainkit.core.machine import cores, threads_of_environment
from trainkit.core.process import run_to_exit_code
from trainkit.core.signals import SIGNALS, delay_signals, handle_stop

POLL = 0.2  # seconds between two looks at the ranks
MAX_ENDING = 20.0  # seconds for the ranks to end after one has failed; then they are stopped, and later killed
MAX_SAVING = 300.0  # seconds for the ranks to save after one was stopped
STOP_CODES = {
    75: "SIGUSR1",
    129: "SIGHUP",
    130: "SIGINT",
    143: "SIGTERM",
}  # exit code -> the signal that stopped a rank
HOST = "127.0.0.1"


def launch(number: int, train: Callable[[], int], words: Sequence[str] = ()) -> int:
    """Run a training in several processes of this machine, as its ranks; return the exit code of the command.

    A signal that arrives here is passed on to the ranks, which save and end. If this process is killed, they do too.

    Args:
        number: the number of processes.
        train: trains as one of the ranks, and returns an exit code.
        words: the arguments of the command line. Messages do not show the secrets in them.

    Returns:
        The exit code of the rank that failed first; 0 if none failed.
    """
    with socket.create_server((HOST, 0)) as address:
        ranks = RunningRanks(_start(number, train, words, address))
        with handle_stop(lambda stop: ranks.send(stop.number)):
            try:
                # Created after the forks, because a fork copies no threads. Early ranks wait for their connection.
                port = address.getsockname()[1]
                store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=address.detach())
                code = ranks.wait()
                del store
                return code
            finally:
                ranks.send(signal.SIGKILL)


def _start(number: int, train: Callable[[], int], words: Sequence[str], address: socket.socket) -> list[Any]:
    # A fork of a process that has not used its GPUs can use them. Other systems do not fork safely.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    threads = threads_of_environment() or max(1, cores() // number)
    processes, unreported = [], context.Semaphore(1)
    with delay_signals():  # each rank unblocks them when it can handle them
        for rank in range(number):
            variables = _variables(rank, number, address.getsockname()[1], threads)
            arguments = train, words, variables, os.getpid(), unreported
            process = context.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
            process.start()
            processes.append(process)
    return processes


def _variables(rank: int, number: int, port: int, threads: int) -> dict[str, str]:
    """Return the environment variables of a rank: those of torchrun, and the threads of each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "trainkit",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
    }


class RunningRanks:
    """The processes of a training.

    Args:
        processes: one for each rank.
    """

    def __init__(self, processes: list[Any]) -> None:
        self.running = processes
        self.signalled = False

    def send(self, number: int) -> None:
        """Send a signal to the ranks that still run."""
        self.signalled = True
        for process in self.running:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def wait(self) -> int:
        """Wait until all ranks have ended; return the exit code of the rank that failed first, or 0."""
        code, deadline, killed = 0, math.inf, False
        while self.running:
            connection.wait([process.sentinel for process in self.running], POLL)
            ended = [process for process in self.running if process.exitcode is not None]
            for process in sorted(ended, key=lambda process: process.exitcode >= 0):  # the others failed because of it
                self.running.remove(process)
                found = _exit_code(process)
                if found and not code:
                    code, deadline = found, time.monotonic() + self._time_to_end(found)
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL if killed else signal.SIGTERM)
                deadline, killed = time.monotonic() + MAX_ENDING, True
        return code

    def _time_to_end(self, code: int) -> float:
        """Return the seconds for the ranks to end after one has ended with a code; pass a stop on to them."""
        if code not in STOP_CODES:
            return MAX_ENDING
        if not self.signalled:  # one rank alone got a signal; a second signal would end a rank that saves
            self.send(getattr(signal, STOP_CODES[code]))
        return MAX_SAVING


def _exit_code(process: Any) -> int:
    """Return the exit code of a rank that has ended. If a signal killed it, print this, and return 128 + its number."""
    code: int = process.exitcode
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    cause = f"{process.name} was killed by {name}" + (": perhaps the memory was full" if name == "SIGKILL" else "")
    print(Problem(cause, "trainkit resume continues the run from its newest checkpoint"), file=sys.stderr, flush=True)
    return 128 - code


# ------------------------------------------------------------------------------------------- in a rank


def _run_rank(
    train: Callable[[], int], words: Sequence[str], variables: dict[str, str], launcher: int, unreported: Any
) -> None:
    """Train as a rank, and end the process with its exit code."""
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    if hasattr(os, "setpgid"):  # a Ctrl-C reaches the launcher alone, which passes it on once
        os.setpgid(0, 0)
    sys.exit(run_to_exit_code(functools.partial(_train, train, launcher, unreported), words))


def _train(train: Callable[[], int], launcher: int, unreported: Any) -> int:
    """Train as a rank; return an exit code.

    The ranks often fail together, for the same reason. Before they are connected, the first one that gets the semaphore
    reports it.
    """
    _stop_with(launcher)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        return train()
    except Exception as error:
        if hasattr(error, "is_printed_by_first"):  # the ranks were connected, and know which of them prints the error
            raise
        if unreported.acquire(block=False):
            error.is_printed_by_first = False  # type: ignore[attr-defined]
            raise
        return error.exit_code if isinstance(error, TrainkitError) else 1


def _stop_with(launcher: int) -> None:
    """Stop this process as SIGTERM does, which saves, if its launcher is killed."""

    def watch() -> None:
        if hasattr(signal, "pthread_sigmask"):  # signals are for the main thread
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while os.getppid() == launcher:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(MAX_SAVING)
        os.kill(os.getpid(), signal.SIGKILL)  # it cannot handle signals, because it waits for another rank

    threading.Thread(target=watch, daemon=True).start()

"""Notices that another rank failed or was lost, so that no rank waits for it forever.

The ranks report to the store of torchrun: each rank counts up a number there, as a sign of life, and the first failure
of any rank is written there. Every exchange between the ranks ends with that failure if the exchange breaks. A thread
ends the process if the exchange does not even break, as after a cut network.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from trainkit.core.errors import Problem, Stopped, TrainkitError
from trainkit.core.process import print_error
from trainkit.core.signals import StopHandler

ROUND = 1.0  # seconds between two signs of life
SILENT_ROUNDS = 30  # a rank without a sign of life for so many rounds is lost
DEAD_ROUNDS = 3  # the same, if an exchange has broken
BROKEN_SECONDS = 6.0  # how long the cause of a broken exchange is searched
# Seconds that the training has to end with a known failure by itself: in an exchange, and in other work.
GRACE_IN_EXCHANGE, GRACE = 5.0, 20.0
LAST_SECONDS = 10.0  # to write how the run ended, if the training does not end by itself


class OtherRankError(TrainkitError):
    """Another rank has failed, so this one ends too.

    Args:
        rank: the other rank.
        exit_code: its exit code.
        problems: what is wrong there.
    """

    def __init__(self, rank: int, exit_code: int, problems: Sequence[Problem]) -> None:
        super().__init__(*(Problem(f"rank {rank}: {problem.cause}", problem.hint) for problem in problems))
        self.rank, self.exit_code, self.problems_there = rank, exit_code, tuple(problems)


@dataclass(frozen=True)
class Failure:
    """How a rank ended with an error, or at a signal.

    Attributes:
        rank: the rank.
        exit_code: its exit code.
        signal: the number of the signal; 0: an error.
        problems: what is wrong.
    """

    rank: int
    exit_code: int
    signal: int
    problems: tuple[Problem, ...]

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Return the failure of a rank that ends with an error."""
        if isinstance(error, OtherRankError):
            return cls(error.rank, error.exit_code, 0, error.problems_there)
        if isinstance(error, KeyboardInterrupt):
            stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            return cls(rank, stopped.exit_code, stopped.number, ())
        known = error if isinstance(error, TrainkitError) else TrainkitError(f"{type(error).__name__}: {error}")
        return cls(rank, known.exit_code, 0, tuple(known.problems))

    @classmethod
    def lost(cls, rank: int, why: str) -> Failure:
        """Return the failure of a rank that has ended without a word, or that cannot be reached."""
        hint = "its own messages and those of torchrun may say more; to continue the run: trainkit resume RUN"
        return cls(rank, 1, 0, (Problem(f"lost, because {why}", hint),))

    def to_json(self) -> str:
        """Return the failure as text."""
        return json.dumps([self.rank, self.exit_code, self.signal, [(p.cause, p.hint) for p in self.problems]])

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        """Return the failure that `to_json` wrote."""
        rank, exit_code, number, problems = json.loads(text)
        return cls(rank, exit_code, number, tuple(Problem(*problem) for problem in problems))

    def as_error(self) -> OtherRankError | Stopped:
        """Return the error with which the other ranks end."""
        return Stopped(self.signal) if self.signal else OtherRankError(self.rank, self.exit_code, self.problems)

    def has_cause_of(self, other: Failure) -> bool:
        """Return whether two ranks ended for the same reason."""
        return (self.signal, self.problems) == (other.signal, other.problems)


class RankWatch:
    """Watches the other ranks of a training.

    Args:
        connect: returns a new connection to the store of this training.
        rank: the number of this process.
        size: the number of processes.

    Attributes:
        failure: the first failure of any rank, once this rank has noticed it.
        on_forced_end: is called with the error before the watch ends the process, in a thread of the watch.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int) -> None:
        self.rank, self.size, self.store = rank, size, connect()
        self.failure: Failure | None = None
        self.on_forced_end: Callable[[TrainkitError | Stopped], object] = lambda _: None
        self.rounds = 0  # of signs of life, that the store has answered
        self.silent = [0] * size  # rounds in a row without a sign of life, for each rank
        self.is_exchanging = self.is_over = False
        # The launcher of the ranks was killed, or its machine. If the exchanges go on, the ranks have time to save.
        self.store_is_closed = False
        self.stopping = threading.Event()
        works = (lambda: self._beat(connect()), self._end_if_stuck)
        self.threads = [threading.Thread(target=work, daemon=True, name="trainkit-ranks") for work in works]

    def start(self) -> None:
        """Start to watch."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stop to watch. Python must not exit while a thread may still return from the store."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(timeout=5)

    # ------------------------------------------------------------------------- the work of the training

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Mark a block that only exchanges values with the other ranks; see `broken_exchanges`.

        Raises:
            OtherRankError: another rank has failed already.
            Stopped: a signal has stopped another rank.
        """
        if self.failure is not None:
            raise self.failure.as_error()
        self.is_exchanging = True
        try:
            with self.broken_exchanges():
                yield
        finally:
            self.is_exchanging = False

    @contextmanager
    def broken_exchanges(self) -> Iterator[None]:
        """Raise the failure of another rank instead of torch's error about the lost connection to it.

        Raises:
            OtherRankError: another rank has failed, or was lost.
            Stopped: a signal has stopped another rank.
        """
        try:
            yield
        except RuntimeError as error:
            is_broken = isinstance(error, DistError) or "gloo" in str(error)
            failure = self._find_failure() if is_broken else None
            if failure is None:
                raise
            raise failure.as_error() from error

    def _find_failure(self) -> Failure | None:
        """Return the failure that broke an exchange; None: no other rank has failed.

        A rank that failed writes it before it disconnects.
        """
        deadline = time.monotonic() + BROKEN_SECONDS
        while self.failure is None and time.monotonic() < deadline:
            dead = [rank for rank, rounds in enumerate(self.silent) if rounds >= DEAD_ROUNDS]
            if dead:
                return self.report(Failure.lost(dead[0], "its process has ended"))
            if self.store_is_closed:
                self.failure = self._lost_store("has closed the connection")
            time.sleep(0.05)
        return self.failure

    def report(self, failure: Failure) -> Failure:
        """Write a failure for the other ranks, unless a rank has failed before; return the first failure."""
        if self.failure is None:
            first = failure
            with suppress(RuntimeError):  # the store is gone
                first = Failure.from_json(self.store.compare_set("failure", "", failure.to_json()))
            self.failure = first
        return self.failure

    def conclude(self, error: BaseException) -> BaseException:
        """Report how this rank ends; return the error that it ends with.

        torchrun sends a signal to the other ranks when a rank has failed, so a failure counts more than a signal.
        """
        self.is_over = True
        handler = StopHandler.active()
        if handler is not None:
            handler.ignore()  # the exit code is decided
        first = self.report(Failure.of(self.rank, error))
        if isinstance(error, KeyboardInterrupt) and not first.signal:
            error = first.as_error()
        if not isinstance(error, KeyboardInterrupt):
            Stopped.pending = None
        return error

    def wait_for_first(self, error: BaseException, *, has_left: bool) -> bool:
        """Wait until rank 0 has written how the run ended; return whether rank 0 prints the error of this rank.

        torchrun ends the other ranks as soon as a rank has exited with an error, so rank 0 exits first.

        Args:
            error: how this rank ends.
            has_left: whether this rank has closed its connections. Otherwise its exit closes them, and rank 0 may be
                waiting for that.
        """
        own = Failure.of(self.rank, error)
        if self.rank == 0:
            self._write_end(own)
            return False
        if not has_left and not own.signal:
            return own.rank != 0 and self.silent[0] < DEAD_ROUNDS
        with suppress(RuntimeError):  # the store is gone
            while self.silent[0] < SILENT_ROUNDS / 3:
                if self.store.check(["end"]):
                    printed = Failure.from_json(self.store.get("end"))
                    is_shown = printed.rank == self.rank or printed.has_cause_of(own)
                    return is_shown or isinstance(error, OtherRankError)
                time.sleep(0.05)
        return False

    def _write_end(self, failure: Failure) -> None:
        with suppress(RuntimeError):  # the store is gone
            self.store.set("end", failure.to_json())

    # ------------------------------------------------------------------------------------------ threads

    def _beat(self, store: Store) -> None:
        """Give and read the signs of life, until the watch is stopped."""
        keys, before = [f"life/{rank}" for rank in range(self.size)], [b""] * self.size
        try:
            while not self.stopping.is_set():
                store.add(keys[self.rank], 1)
                signs = store.multi_get(keys)
                self.silent = [
                    rounds + 1 if sign == old else 0
                    for rounds, sign, old in zip(self.silent, signs, before, strict=True)
                ]
                before = signs
                if self.failure is None and store.check(["failure"]):
                    self.failure = Failure.from_json(store.get("failure"))
                lost = [rank for rank, rounds in enumerate(self.silent) if rounds >= SILENT_ROUNDS]
                if lost and self.failure is None:
                    self.report(Failure.lost(lost[0], f"it gave no sign of life for {SILENT_ROUNDS * ROUND:g} s"))
                self.rounds += 1
                self.stopping.wait(ROUND)
        except RuntimeError:
            self.store_is_closed = True

    def _lost_store(self, what: str) -> Failure:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cause = f"the store of torchrun at {address} {what}"
        return Failure(self.rank, 1, 0, (Problem(cause, "the other machine, its torchrun or the network failed"),))

    def _end_if_stuck(self) -> None:
        """End the process if the training does not end by itself although another rank has failed."""
        seen, stalled, waited = -1, 0, 0.0
        while not self.stopping.wait(ROUND):
            stalled = stalled + 1 if seen == self.rounds else 0
            seen = self.rounds
            if self.failure is None and stalled >= SILENT_ROUNDS:
                self.failure = self._lost_store(f"has not answered for {SILENT_ROUNDS * ROUND:g} s")
            if self.failure is not None and not self.is_over:
                waited += ROUND
                if waited >= (GRACE_IN_EXCHANGE if self.is_exchanging else GRACE):
                    self._end_process(self.failure)

    def _end_process(self, failure: Failure) -> None:
        error = failure.as_error()
        timer = threading.Timer(LAST_SECONDS, os._exit, [failure.exit_code])
        timer.daemon = True
        timer.start()
        with suppress(Exception):  # the first cause counts
            self.on_forced_end(error)
        print_error(error)
        if self.rank == 0:
            self._write_end(failure)
        os._exit(failure.exit_code)

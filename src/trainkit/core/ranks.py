"""The processes that train one model together. `torchrun` starts them, and each of them is a rank.

Every rank holds the whole state of the training: weights, optimizer state and progress. In a step, each rank computes
on its share of the batch. Losses, denominators and gradients are summed over the ranks before they are used, so the
states stay equal to each other, and to the state of a training in one process.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import ConfigError, Stopped, TrainkitError
from trainkit.core.rank_gradients import kinds_of_gradients, sum_gradients
from trainkit.core.rank_watch import OtherRankError, RankWatch
from trainkit.core.shards import is_sharded

Value = TypeVar("Value")

MESSAGE = 8  # numbers of an agreement; a fixed size, because a rank that failed has none to offer
# How the work of a rank ended. FOLLOWED: with an error, because another rank had failed.
FINE, FOLLOWED, OUT_OF_MEMORY, FAILED = 0, 1, 2, 3
CHECK_SECONDS = 1.0  # how often a rank that waits in a forward or backward pass checks whether another has failed


class RankFailedInPassError(Exception):
    """Another rank has failed in a forward or backward pass. `Ranks.together` replaces it by the error of that rank."""


class Agreement:
    """The numbers that the ranks exchange when all of them have done a piece of work.

    Attributes:
        offered: the numbers of this rank.
        columns: for each number, the values of all ranks.
    """

    def __init__(self) -> None:
        self.offered: list[int] = []
        self.columns: list[list[int]] = []

    def offer(self, *numbers: int) -> None:
        """Set the numbers of this rank."""
        self.offered, self.columns = [*numbers], [[number] for number in numbers]


def _describe(error: Exception) -> TrainkitError:
    return TrainkitError(f"{type(error).__name__}: {error}")


class Ranks:
    """The ranks of a training, as one of them sees them. A training in one process has one rank.

    Each method but the properties waits for all ranks, so every rank must call the same methods in the same order.
    With one rank, no method waits.

    Args:
        rank: the number of this process, from 0. Rank 0 owns the run directory and the display.
        size: the number of processes.
        watch: ends each exchange that waits for a rank that has failed.
        launch: the store that torchrun keeps when it starts the ranks again.

    Attributes:
        explain: returns the error that a user sees for another error. The engine sets a function that knows the config.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, watch: RankWatch | None = None, launch: Store | None = None
    ) -> None:
        self.rank, self.size, self.watch, self.launch = rank, size, watch, launch
        self.explain: Callable[[Exception], TrainkitError] = _describe
        self.failures = 0  # failures of any rank that all ranks have agreed on
        self._pass_group: tuple[int, Any] | None = None  # see `gather_in_pass`

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there is more than one rank."""
        return self.size > 1

    def device_of_rank(self, device: torch.device) -> torch.device:
        """Return the device of this rank: each rank of a machine has its own GPU.

        Raises:
            ConfigError: the ranks cannot use the device.
        """
        if not self.are_several or device.type == "cpu":
            return device
        local, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if device.type != "cuda" or device.index is not None:
            cause = f"device={device}: {self.size} ranks cannot share it"
            raise ConfigError(cause, hint="write device=auto or device=cpu")
        if local >= count:
            cause = f"this machine has {count} GPUs and at least {local + 1} ranks"
            raise ConfigError(cause, hint=f"write torchrun --nproc-per-node {count}, or device=cpu")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def on_forced_end(self, write: Callable[[TrainkitError | Stopped], object]) -> None:
        """Call a function before this process is ended because it waits for a rank that was lost."""
        if self.watch is not None:
            self.watch.on_forced_end = write

    def exchange(self) -> AbstractContextManager[None]:
        """Return a block that only exchanges values with the other ranks; see `RankWatch.exchange` for its errors."""
        return nullcontext() if self.watch is None else self.watch.exchange()

    def broken_exchanges(self) -> AbstractContextManager[None]:
        """Return a block in which a lost connection becomes the failure of the other rank; see `RankWatch`."""
        return nullcontext() if self.watch is None else self.watch.broken_exchanges()

    def remember(self, key: str, text: str) -> None:
        """Keep a text for the next ranks, which torchrun starts if these ranks fail."""
        if self.launch is not None:
            self.launch.set(key, text)

    def recall(self, key: str) -> str | None:
        """Return the text that earlier ranks of the same torchrun have kept; None if there is none."""
        found = self.launch is not None and self.launch.check([key])
        return self.launch.get(key).decode() if self.launch is not None and found else None

    # --------------------------------------------------------------------------------------- values

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks; the tensor itself stays as it is."""
        if not self.are_several:
            return value
        total = value.detach().clone()
        with self.exchange():
            dist.all_reduce(total)
        return total

    def sum_number(self, value: Tensor | float, device: torch.device) -> Tensor | float:
        """Return the sum of a number over the ranks; with several ranks, it is a float64 scalar on the device."""
        if not self.are_several:
            return value
        return self.sum(torch.as_tensor(value).to(device, torch.float64))

    def agree(self, *numbers: int) -> list[list[int]]:
        """Return the numbers that each rank passes, by rank."""
        if not self.are_several:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with self.exchange():
            dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def wait(self) -> None:
        """Wait for all ranks."""
        self.agree(0)

    def gather(self, value: Value) -> list[Value]:
        """Return the value that each rank passes, by rank. Values are pickled, so they should be small or rare."""
        if not self.are_several:
            return [value]
        values: list[Any] = [None] * self.size
        with self.exchange():
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Value) -> Value:
        """Return the value that rank 0 passes. It is pickled."""
        if not self.are_several:
            return value
        values = [value]
        with self.exchange():
            dist.broadcast_object_list(values)
        return values[0]

    def let_first(self, work: Callable[[], Value]) -> Value:
        """Let rank 0 do a piece of work; return its result, which is pickled, on every rank.

        An error of rank 0 ends all ranks, see `together`.
        """
        result: Any = None
        with self.together():
            if self.is_first:
                result = work()
        done: Value = self.first(result)
        return done

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values that tensors have on rank 0 into the same tensors of every rank."""
        if not self.are_several:
            return
        for tensor in tensors:
            values = tensor.detach().clone(memory_format=torch.contiguous_format)
            with self.exchange():
                dist.broadcast(values, 0)
            with torch.no_grad():
                tensor.copy_(values)

    # ------------------------------------------------------------------- in a forward or backward pass

    @property
    def pass_group(self) -> Any:
        """The process group of the messages in a pass. After a failure it is a new one, without open messages."""
        if self._pass_group is None or self._pass_group[0] != self.failures:
            self._pass_group = self.failures, dist.new_group()
        return self._pass_group[1]

    def close(self) -> None:
        """Release the connections of the messages in a pass."""
        self._pass_group = None

    def gather_in_pass(self, own: Tensor) -> Tensor:
        """Return the tensors that the ranks pass in a forward or backward pass, in rows. Their shapes are equal.

        A pass may fail on one rank, which then does not take part any more.

        Raises:
            RankFailedInPassError: another rank has failed.
        """
        if not self.are_several:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.size)]
        work = dist.all_gather(rows, own.contiguous(), group=self.pass_group, async_op=True)
        if own.device.type != "cpu":
            work.wait()
            return torch.stack(rows)
        while True:
            try:
                work.wait(timedelta(seconds=CHECK_SECONDS))
                return torch.stack(rows)
            except RuntimeError:
                if work.is_completed():
                    raise
            if _store().check([self._failure_key]):
                raise RankFailedInPassError

    @property
    def _failure_key(self) -> str:
        return f"trainkit/failure/{self.failures}"

    # ---------------------------------------------------------------------------------------- errors

    @contextmanager
    def together(self, *, connected: bool = False) -> Iterator[Agreement]:
        """End the block with an error on every rank, if it ends with an error on any rank.

        The block may offer numbers to the other ranks.

        Args:
            connected: the ranks exchange data in the block, so the other ranks cannot leave it after an error of this
                rank. The error then ends this rank at once, and the lost connection ends the others.

        Raises:
            OtherRankError: another rank failed first.
            torch.OutOfMemoryError: memory ran out on some rank, and no rank failed for another reason.
        """
        agreement, error = Agreement(), None
        try:
            yield agreement
        except Exception as caught:
            if not self.are_several or connected:
                raise
            error = caught
        if self.are_several:
            self._settle(error, agreement)

    @contextmanager
    def summed_gradients(self, params: Iterable[Tensor], *, connected: bool = False) -> Iterator[None]:
        """Sum the gradients of the parameters over the ranks at the end of the block; see `together` for errors.

        A parameter that has no gradient on any rank keeps none, because optimizers skip such a parameter. The
        gradient of a sharded parameter is a sum already.
        """
        with self.together(connected=connected) as agreement:
            yield
            params = [p for p in params if p.requires_grad and not is_sharded(p)] if self.are_several else []
            kinds = kinds_of_gradients(params)
            agreement.offer(zlib.crc32(kinds))
        if self.are_several:
            are_equal = len(set(agreement.columns[0])) == 1
            sum_gradients(params, [kinds] if are_equal else self.gather(kinds), self)

    def _settle(self, error: Exception | None, agreement: Agreement) -> None:
        """Raise an error if any rank has one; otherwise exchange the numbers of the agreement."""
        kind = _kind_of(error)
        if kind >= OUT_OF_MEMORY:
            _store().set(self._failure_key, "")  # other ranks may wait in a pass
        own = [kind, *agreement.offered]
        rows = self.agree(*own, *[0] * (MESSAGE - len(own)))
        kinds = [row[0] for row in rows]
        worst = max(kinds)
        if worst == FINE:
            agreement.columns = [[row[1 + index] for row in rows] for index in range(len(agreement.offered))]
            return
        first = kinds.index(worst)
        if self.is_first and worst >= OUT_OF_MEMORY:
            _store().delete_key(self._failure_key)
        self.failures += 1
        if worst == FOLLOWED and error is not None:
            raise error
        if worst == OUT_OF_MEMORY:
            if error is not None and kind == worst:
                raise error
            raise torch.OutOfMemoryError(f"rank {first} ran out of memory") from error
        explained = error if error is None or isinstance(error, TrainkitError) else self.explain(error)
        own_failure = None if explained is None else (explained.exit_code, explained.problems)
        found = self.gather(own_failure)[first]
        if self.rank == first and error is not None:
            raise error
        assert found is not None
        exit_code, problems = found
        raise OtherRankError(first, exit_code, problems) from error


def _kind_of(error: Exception | None) -> int:
    """Return how work ended that raised an error, or None."""
    if error is None:
        return FINE
    if isinstance(error, OtherRankError | RankFailedInPassError):
        return FOLLOWED
    return OUT_OF_MEMORY if is_out_of_memory(error) else FAILED


def _store() -> Any:
    """Return the key-value store of the ranks."""
    return dist.distributed_c10d._get_default_store()


ALONE = Ranks()  # the one rank of a training in one process

"""Connect the processes that torchrun started, and disconnect them."""

from __future__ import annotations

import itertools
import os
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from trainkit.core.rank_variables import number_of_ranks
from trainkit.core.rank_watch import Failure, RankWatch
from trainkit.core.ranks import Ranks

JOIN_SECONDS = 300.0  # for the slowest rank to import its modules
LONGEST_WAIT = timedelta(days=1)  # for rank 0, which may prepare data or write; the watch notices lost ranks earlier

_trainings = itertools.count()  # a process may train several times
_joined: list[Ranks] = []  # the connected ranks


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Connect the processes that torchrun started, for the block. Without torchrun, there is one rank.

    An inner block uses the connection of the outer block. The ranks exchange tensors of the CPU through gloo, and
    tensors of an NVIDIA GPU through NCCL.

    Raises:
        OtherRankError: another rank has failed, or was lost.
    """
    size = number_of_ranks()
    if size == 1:
        yield Ranks()
        return
    if _joined:
        yield _joined[-1]
        return
    rank, prefix = int(os.environ["RANK"]), f"trainkit/{next(_trainings)}"
    launch = PrefixStore(prefix, _connect(rank))
    prefix += f"/{meet(launch, rank, size)}"
    watch = RankWatch(lambda: PrefixStore(prefix, _connect(rank)), rank, size)
    has_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    watch.start()
    try:
        with watch.exchange():
            store = PrefixStore("group", watch.store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
        ranks = Ranks(rank, size, watch, launch)
        _joined.append(ranks)
        with watch.broken_exchanges():
            yield ranks
        ranks.wait()  # all ranks end together
    except BaseException as error:
        concluded = watch.conclude(error)
        _free_frames(error)
        for ranks in _joined:
            ranks.close()
        has_left = _leave_group()  # ends the exchanges of the other ranks
        concluded.is_printed_by_first = watch.wait_for_first(concluded, has_left=has_left)  # type: ignore[attr-defined]
        if concluded is error:
            raise
        raise concluded from error
    else:
        watch.stop()
        _leave_group()
    finally:
        _joined.clear()
        watch.stop()


def _connect(rank: int) -> Store:
    """Return a new connection to the store of torchrun; rank 0 starts the store if torchrun has none."""
    is_first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=is_first, wait_for_workers=False, multi_tenant=True)


def _leave_group() -> bool:
    """Disconnect from the other ranks; return whether that worked. DDP and FSDP2 stay connected while they exist."""
    if not dist.is_initialized():
        return True
    group = weakref.ref(dist.group.WORLD)
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)  # NCCL may wait for the other ranks
    leaving.start()
    leaving.join(timeout=5)
    return group() is None


def _free_frames(error: BaseException) -> None:
    """Free the objects that the frames of an error hold, such as the connections to the other ranks."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:  # an error may be its own cause
        chain.append(following)
        traceback.clear_frames(following.__traceback__)
        following = following.__cause__ or following.__context__


def meet(store: Store, rank: int, size: int) -> str:
    """Wait until all ranks are there; return the name of this start of the ranks.

    torchrun keeps its store if it starts the ranks again, so the store may hold the words of ranks that have ended.
    Rank 0 gives each start a new name. Another rank believes a name once it is among those that rank 0 has met.

    Raises:
        OtherRankError: a rank does not come.
    """
    own, name = os.urandom(8).hex(), ""
    deadline = time.monotonic() + JOIN_SECONDS
    if rank == 0:
        name = own
        store.set("start", name)
    pause = 0.01
    while time.monotonic() < deadline:
        if rank == 0:
            keys = [f"{name}/{other}" for other in range(1, size)]
            if store.check(keys):
                store.set(f"{name}/met", b" ".join(store.multi_get(keys)).decode())
                return name
        elif store.check(["start"]):
            name = store.get("start").decode()
            store.set(f"{name}/{rank}", own)
            if store.check([f"{name}/met"]) and own in store.get(f"{name}/met").decode().split():
                return name
        time.sleep(pause)  # in Python, so that a signal can end it
        pause = min(0.5, 1.5 * pause)
    missing = next((r for r in range(1, size) if not store.check([f"{name}/{r}"])), 0) if rank == 0 else 0
    raise Failure.lost(missing, f"it did not start within {JOIN_SECONDS:g} s").as_error()

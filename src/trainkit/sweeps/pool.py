"""Run jobs in processes: as many at a time as there are slots, each a fork of a server that has imported torch."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from trainkit.config.compose import Composed
from trainkit.config.jobs import libraries_of
from trainkit.core.errors import ConfigError, Stopped, TrainkitError
from trainkit.core.signals import delay_signals, handle_stop
from trainkit.sweeps.resources import Capacity, MemoryGuard, children_of, devices_of

PRELOAD = "trainkit.sweeps.preload"
POLL = 0.2  # seconds between two looks at the running jobs
MAX_PREPARATION = 10.0  # seconds for preparing the other jobs while a sweep stops
MAX_SAVING = 60.0  # seconds for a job to save after its server was killed; then the job is killed
SERVER_LOST = 255  # the exit code that multiprocessing gives to a process whose server has ended


@dataclass
class Task:
    """A job to run.

    Attributes:
        number: of the job in its sweep.
        name: its overrides, without those that all jobs share.
        directory: of its run; it exists.
        config: with Hydra's node.
        threads: of torch, as in earlier attempts; None: as the capacity gives.
        attempts: how many times this command has started the job.
    """

    number: int
    name: str
    directory: Path
    config: DictConfig
    threads: int | None = None
    attempts: int = 0


@dataclass
class RunningJob:
    """A task with its process."""

    task: Task
    process: Any
    slots: list[str | None]  # that the job occupies, see `Capacity`
    channel: connection.Connection | None = None  # the job asks here at the end of each epoch; None: it does not ask
    started: float = field(default_factory=time.monotonic)

    @property
    def pids(self) -> list[int]:
        """The processes of the job: with several devices, it has a process for each."""
        own: int = self.process.pid
        return [own, *(children_of(own) if len(self.slots) > 1 else [])]


class Observer(Protocol):
    """What follows the jobs of a pool."""

    def on_start(self, job: RunningJob, threads: int) -> None:
        """A job is about to start."""

    def on_end(self, job: RunningJob, exit_code: int | None) -> bool:
        """A job has ended, None: in an unknown way; return whether to run it again."""

    def on_question(self, job: RunningJob, question: Any) -> Any:
        """A job asks through its channel; return the answer."""

    def on_poll(self, running: list[RunningJob], waiting: int) -> None:
        """Some time has passed."""

    @property
    def is_incomplete(self) -> bool:
        """Whether a job was stopped."""

    @property
    def stop_early(self) -> bool:
        """Whether to stop all jobs."""


def start_server_for(job: Composed) -> None:
    """Start the server of job processes, with the libraries that a job uses; see `start_server`."""
    start_server(libraries_of(job.settings.source))


def start_server(libraries: Sequence[str] = ()) -> None:
    """Start the server of job processes, which imports torch in the background. Does nothing if it runs.

    Args:
        libraries: that the server imports too. Without them each job would, for seconds.
    """
    if _context().get_start_method() == "fork":
        return
    _context().set_forkserver_preload([PRELOAD, *libraries])
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # ./random.py must not shadow Python's module in the server
    try:
        resource_tracker.ensure_running()  # it unblocks signals, so it must not start in the block below
        with delay_signals():  # the server never handles signals, so that it outlives a Ctrl-C
            forkserver.ensure_running()
        atexit.unregister(_end_server)  # this may be a second call
        atexit.register(_end_server)
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _end_server() -> None:
    """End the server with the command, also while it imports torch."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _start_process(process: Any) -> None:
    """Start a process of the server; return as soon as the server has imported torch.

    Raises:
        TrainkitError: the server was killed.
    """
    try:
        process.start()
    except (EOFError, OSError) as error:
        cause = "the server that starts the jobs was killed" if isinstance(error, EOFError) else str(error)
        raise TrainkitError(f"no job can be started: {cause}", hint="check the memory of this machine") from error


def _context() -> Any:
    """Return how processes start: as forks of a server, or of this process if it has imported torch already."""
    return multiprocessing.get_context("fork" if "torch" in sys.modules else "forkserver")


def call_in_server(function: Callable[..., list[Any]], *args: Any) -> list[Any]:
    """Return what a function returns in a process of the server, which has imported torch; [] if the process ends."""
    start_server()
    context = _context()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(writer, function, args))
    try:
        _start_process(process)
        writer.close()
        found: list[Any] = reader.recv()
        return found
    except EOFError:  # the process was killed, or user code ended it
        return []
    finally:
        reader.close()
        if process.pid is not None:
            process.kill()  # has no effect on a process that has ended
            process.join()
            process.close()


def _send_result(writer: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    result = function(*args)
    with contextlib.suppress(OSError):  # the command has ended
        writer.send(result)


class Pool:
    """Runs tasks in processes.

    Args:
        capacity: the slots.
        make_target: returns what the process of a task calls: `make_target(task, threads, gpus, channel)`.
        observer: follows the jobs.
        asks: whether the jobs ask the observer at the end of each epoch, through the channel. Otherwise it is None.
    """

    def __init__(
        self,
        capacity: Capacity,
        make_target: Callable[..., Callable[[], None]],
        observer: Observer,
        *,
        asks: bool = False,
    ) -> None:
        self.capacity, self.make_target, self.observer, self.asks = capacity, make_target, observer, asks
        self.free = list(capacity.slots)
        self.running: list[RunningJob] = []
        self.waiting: deque[Task] = deque()
        self.memory = MemoryGuard()
        self.context = _context()
        self.stop: Stopped | None = None
        self.ending = False

    def run(self, tasks: Iterator[Task | None], *, ahead: bool = True) -> None:
        """Run tasks; return when all have ended.

        Args:
            tasks: read lazily, so the first job starts before the last task is prepared. None: there is no task yet.
            ahead: prepare tasks while all slots are busy. Otherwise a task is read when it can start.

        Raises:
            Stopped: a signal arrived. It was sent to all jobs, and they have ended.
        """
        start_server()
        more = True
        with handle_stop(self._request_stop):
            try:
                while more or self.running or self.waiting:
                    if self.stop or self.observer.stop_early:
                        break
                    found = False
                    if more and (ahead or (self._has_room and not self.waiting)):
                        more, found = self._take(tasks)
                    self._fill()
                    # Do not wait while tasks are still being prepared.
                    self._reap(0.0 if found else POLL)
            finally:
                self._end_all(tasks if ahead else iter(()))
        if self.stop is not None and (more or self.waiting or self.observer.is_incomplete):
            raise self.stop

    def _request_stop(self, stop: Stopped) -> None:
        self.stop = stop

    def _take(self, tasks: Iterator[Task | None]) -> tuple[bool, bool]:
        """Prepare the next task; return whether there may be more, and whether there was one."""
        for task in tasks:
            if task is not None:
                self.waiting.append(task)
            return True, task is not None
        return False, False

    @property
    def _has_room(self) -> bool:
        return bool(self.free) and len(self.running) < self.capacity.jobs

    def _fill(self) -> None:
        """Start waiting tasks in free slots. At least one job runs, even if memory is short."""
        while self.waiting and self._has_room and not self.stop:
            if self.running and not self.memory.allows(job.pids for job in self.running):
                return
            slots = self.capacity.take(self.free, _devices(self.waiting[0]))
            if not slots:
                return
            self._start(self.waiting.popleft(), slots)

    def _start(self, task: Task, slots: list[str | None]) -> None:
        threads = task.threads or self.capacity.threads
        task.attempts += 1
        own, of_job = self.context.Pipe() if self.asks else (None, None)
        gpus = ",".join(gpu for gpu in slots if gpu is not None) or None
        target = self.make_target(task, threads, gpus, of_job)
        process = self.context.Process(target=target, name=f"job {task.number}")
        job = RunningJob(task, process, slots, own)
        self.observer.on_start(job, threads)
        with delay_signals():  # a process that is half started could not be stopped
            _start_process(process)
            self.running.append(job)
        if of_job is not None:
            of_job.close()
        job.started = time.monotonic()

    def _reap(self, timeout: float) -> None:
        """Wait until a job ends or asks or the time is over; answer, and record the jobs that have ended."""
        channels = [job.channel for job in self.running if job.channel is not None]
        connection.wait([*(job.process.sentinel for job in self.running), *channels], timeout)
        for job in self.running:
            self._answer(job)
        for job in [job for job in self.running if job.process.exitcode is not None]:
            self.running.remove(job)
            self.free += job.slots
            code = job.process.exitcode
            exit_code = code if code >= 0 else 128 - code  # 128 + N for signal N
            if job.channel is not None:  # closed first, because an orphan may wait for an answer
                job.channel.close()
            if code == SERVER_LOST:
                _end_orphan(job.process.pid)
                exit_code = None
            job.process.close()
            if self.observer.on_end(job, exit_code) and self.stop is None:
                self.waiting.append(job.task)
        self.observer.on_poll(self.running, len(self.waiting))

    def _answer(self, job: RunningJob) -> None:
        """Answer what a job asks. While all jobs are being stopped, the answer is None."""
        while job.channel is not None:
            try:
                if not job.channel.poll():
                    return
                question = job.channel.recv()
            except (EOFError, OSError):  # the job has ended
                job.channel.close()
                job.channel = None
                return
            answer = None if self.ending else self.observer.on_question(job, question)
            with contextlib.suppress(OSError):
                job.channel.send(answer)

    def _end_all(self, tasks: Iterator[Task | None]) -> None:
        """Stop the jobs that run, wait until they have saved, and record how they ended.

        Meanwhile, prepare the other tasks, so that a resume finds them.
        """
        self.ending = True
        number = self.stop.number if self.stop is not None else signal.SIGTERM
        for job in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.process.pid, number)
                if hasattr(signal, "SIGCONT"):  # a job that is paused could not handle the signal
                    os.kill(job.process.pid, signal.SIGCONT)
        deadline = time.monotonic() + MAX_PREPARATION
        while time.monotonic() < deadline and self._take(tasks)[0]:
            self._reap(0.0)
        while self.running:
            self._reap(POLL)


def _devices(task: Task) -> int:
    try:
        return devices_of(task.config)
    except ConfigError:  # the job itself reports it
        return 1


def _end_orphan(pid: int) -> None:
    """Stop a job whose server was killed, and wait for its end: nobody else would notice the job."""
    deadline = time.monotonic() + MAX_SAVING
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGTERM)
        while True:
            time.sleep(POLL)
            os.kill(pid, 0 if time.monotonic() < deadline else signal.SIGKILL)

"""A job of a sweep: trains its config in its directory, or continues its run there."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from trainkit.config.jobs import Job, task_overrides
from trainkit.core.errors import Stopped, TrainkitError, describe_bug
from trainkit.core.process import run_to_exit_code
from trainkit.core.rank_variables import is_first_rank
from trainkit.core.redaction import hide_arguments
from trainkit.core.signals import SIGNALS
from trainkit.core.terminal import printable_lines
from trainkit.engine.launch import launch
from trainkit.engine.resume import continue_run
from trainkit.engine.summary import result_lines
from trainkit.engine.train import train
from trainkit.runs.directory import Run
from trainkit.runs.recovery import is_finished, recover_run
from trainkit.runs.reload import Reloaded
from trainkit.sweeps.resources import devices_of

WAIT = 0.2  # seconds between two looks at whether a signal has arrived


def train_job(
    config: DictConfig, config_dir: str | None = None, *, prepared: bool = False, hooks: Sequence[Any] = ()
) -> Run:
    """Train the job that Hydra runs, or continue its run. A completed run is returned unchanged.

    Args:
        config: of the job.
        config_dir: a folder of configs besides ./conf.
        prepared: the config was composed by `compose_job`, which drops the arguments of replaced `_target_`s.
        hooks: further hooks of the training.

    Raises:
        TrainkitError: with a clear message.
        Stopped: a signal stopped the training.
    """
    job = Job.current()
    run = recover_run(job.directory)
    if is_finished(run):
        return run
    composed = job.composed(config, config_dir, prepared=prepared)
    if (job.directory / "run.json").exists() or (job.directory / "checkpoints").is_dir():
        return continue_run(run, Reloaded(composed.settings, job.overrides, []), hooks=hooks)
    return train(composed, hooks=hooks)


def sweep_job(config: DictConfig, config_dir: str | None = None) -> int:
    """Train a job in a process of a launcher such as joblib's; return its exit code."""
    if str(Path.cwd()) not in sys.path:  # as the command does
        sys.path.append(str(Path.cwd()))
    start_children_as_a_run_does()
    try:
        number = devices_of(config)
        if number > 1:
            return launch(number, functools.partial(_sweep_rank, config, config_dir), Job.current().overrides)
        train_job(config, config_dir)
    except (Exception, SystemExit) as error:  # the other jobs continue
        job = Job.current()
        text = hide_arguments(str(error) if isinstance(error, TrainkitError) else describe_bug(error), job.overrides)
        print(text, file=sys.stderr)
        with contextlib.suppress(OSError), (job.directory / "output.log").open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")
        return error.exit_code if isinstance(error, TrainkitError) else 1
    return 0


def _sweep_rank(config: DictConfig, config_dir: str | None) -> int:
    train_job(config, config_dir)
    return 0


def run_job_process(
    config: DictConfig, threads: int, gpus: str | None, log: Path, channel: Connection | None = None
) -> None:
    """Run a job in this process, and end the process with the exit code of the job.

    Args:
        config: with Hydra's node.
        threads: of torch.
        gpus: the CUDA devices of the job, as in `CUDA_VISIBLE_DEVICES`; None: all devices.
        log: the file for its output.
        channel: to ask a search whether to continue; None: this is not a job of a search.
    """
    redirect_output(log)
    start_children_as_a_run_does()
    stop_with_parent()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)  # of child processes
    torch.set_num_threads(threads)
    words = task_overrides(config)
    sys.exit(run_to_exit_code(lambda: _run_on_devices(config, channel, words), words))


def _run_on_devices(config: DictConfig, channel: Connection | None, words: Sequence[str]) -> int:
    """Run a job in this process, or in a process for each of its devices; return its exit code."""
    if hasattr(signal, "pthread_sigmask"):  # the server blocks signals, so that none is lost
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    number = devices_of(config)
    return launch(number, functools.partial(_run, config, channel), words) if number > 1 else _run(config, channel)


def _run(config: DictConfig, channel: Connection | None) -> int:
    """Run a job as Hydra does; return its exit code."""
    version.setbase("1.3")  # jobs stay in the working directory
    setup_globals()
    hooks = [] if channel is None else [AskSearch(channel)]
    done = run_job(
        hydra_context=HydraContext(config_loader=None, callbacks=Callbacks(config)),  # type: ignore[arg-type]
        task_function=lambda config: train_job(config, prepared=True, hooks=hooks),
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        configure_logging=False,
    )
    if done.status is not JobStatus.COMPLETED:
        raise done._return_value
    if is_first_rank():
        print(printable_lines(result_lines(done.return_value)))
    return 0


class Paused(Stopped):
    """A search has requested the training to stop at the end of an epoch; the training may be continued later.

    Args:
        why: who stopped it, and when.
    """

    def __init__(self, why: str) -> None:
        super().__init__(signal.SIGTERM)  # a number, by which the ranks agree that they stop
        self.name, self.exit_code, self.args = why, 75, (why,)


class AskSearch:
    """A hook that asks the search at the start and after each epoch whether to continue.

    Args:
        channel: to the process of the search.
    """

    def __init__(self, channel: Connection) -> None:
        self.channel = channel

    def on_start(self, state: Any) -> None:
        """Ask before the first epoch, because the answer for the last epoch of a killed job may be lost."""
        self._ask(state)

    def on_epoch_end(self, state: Any, metrics: Any) -> None:  # noqa: ARG002
        """Ask; the history holds the metrics of the epoch already."""
        self._ask(state)

    def _ask(self, state: Any) -> None:
        epoch, ranks = state.progress.epoch, state.objects.ranks
        answer = ranks.first(self._answer(state, epoch) if ranks.is_first else None)
        if answer is not None and not state.done and state.stop is None:
            state.stop = Paused(f"{answer} after epoch {epoch}")

    def _answer(self, state: Any, epoch: int) -> Any:
        """Return the answer of the search; None: the training continues."""
        try:
            self.channel.send(epoch)
            while not self.channel.poll(WAIT):
                if state.stop is not None:  # perhaps the search was killed
                    return None
            return self.channel.recv()
        except (EOFError, OSError):  # the search was killed; `stop_with_parent` stops this process
            return None


def redirect_output(log: Path) -> None:
    """Append everything that this process prints to a file, and read nothing from the terminal."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, descriptor), (2, descriptor)):
        os.dup2(source, target)


def start_children_as_a_run_does() -> None:
    """Start the processes that read data in the default way of this platform, as a run without a sweep does.

    By default they would start as this process did: each job would start a server of its own, which does not import
    torch, and so each of its processes would import everything again.
    """
    multiprocessing.set_start_method(None, force=True)


def stop_with_parent() -> None:
    """Stop this process as SIGTERM does, which saves, if the process that started it is killed."""
    parent = parent_process()

    def wait() -> None:
        if hasattr(signal, "pthread_sigmask"):  # signals are for the main thread
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()

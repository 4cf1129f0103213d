"""A process that trains with one choice of settings, some steps at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from trainkit.config.settings import Settings
from trainkit.core.machine import cores
from trainkit.diagnostics.choices import Choice, Facts

FIRST_STEPS = 10  # whose losses are compared
MAX_SECONDS = 180.0  # until the first steps are done; the compilation of a large model takes longer


class TrialError(Exception):
    """A choice cannot be used; the message is the first line of the reason."""


class Trial:
    """A training in a process of its own, so that threads, memory and compiled code are its own.

    Args:
        words: the overrides of the command line.
        config_dir: the value of `--config-dir`.
        choice: the settings that are tried.

    Attributes:
        facts: about the training that the process has built.
        memory: the peak memory in bytes so far.
    """

    facts: Facts

    def __init__(self, words: Sequence[str], config_dir: str | None, choice: Choice) -> None:
        context = multiprocessing.get_context("spawn")
        self.choice = choice
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, [*words], config_dir, choice))
        self.process.start()
        theirs.close()

    def begin(self) -> Facts:
        """Wait for the first steps; return the facts about the training.

        Raises:
            TrialError: the training cannot be built, or fails, or takes too long.
        """
        self.facts = self._answer()
        self.memory = self.facts.memory
        return self.facts

    def time_steps(self, steps: int) -> float:
        """Train for some more steps; return the samples per second.

        Raises:
            TrialError: the training fails.
        """
        self.connection.send(steps)
        samples, seconds, self.memory = self._answer()
        return float(samples / seconds)

    def _answer(self) -> Any:
        try:
            if not self.connection.poll(MAX_SECONDS):
                raise TrialError(f"no answer within {MAX_SECONDS:.0f} s")
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise TrialError(f"the process has ended with code {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise TrialError(answer)
        return answer

    def close(self) -> None:
        """End the process and those that read its data."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _serve(connection: Connection, words: list[str], config_dir: str | None, choice: Choice) -> None:
    """Build the training and send its facts, then train for as many steps as the connection asks for."""
    if choice.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(choice.threads)  # before the import of torch
    with redirect_stdout(sys.stderr):
        try:
            _train(connection, words, config_dir, choice)
        except (EOFError, KeyboardInterrupt, BrokenPipeError):  # the command has ended
            pass
        except BaseException as error:
            connection.send(_reason(error))


def _train(connection: Connection, words: list[str], config_dir: str | None, choice: Choice) -> None:
    import torch

    from trainkit.build.memory_format import convolutions_of
    from trainkit.build.session import build_session
    from trainkit.config.compose import compose_run
    from trainkit.core.device import peak_memory, synchronize
    from trainkit.data.loaders import StreamingLoader
    from trainkit.diagnostics.batches import FixedStepsLoader
    from trainkit.diagnostics.phases import run_trainkit_loop
    from trainkit.training.losses import whole_batch_module

    settings = settings_of_timed_steps(compose_run([*words, *choice.overrides], config_dir).settings)
    session = build_session(settings, lambda *_: None)
    state, objects = session.state, session.state.objects
    loader = FixedStepsLoader(session.train, 1)
    try:
        memory_format = str(session.train.prepare.memory_format).removeprefix("torch.").removesuffix("_format")
        losses = []
        for _ in range(FIRST_STEPS):
            run_trainkit_loop(state, loader)
            losses.append(state.progress.loss.item())
        step = objects.training_step
        connection.send(
            Facts(
                device=objects.device.type,
                threads=torch.get_num_threads(),
                cores=cores(),
                memory_format=memory_format if convolutions_of(objects.model) else None,
                is_streamed=isinstance(session.train, StreamingLoader),
                may_split=not objects.tracks_statistics
                and whole_batch_module(objects.model, objects.loss_fn) is None
                and (step is None or step.may_split),
                losses=tuple(losses),
                memory=peak_memory(objects.device),
            )
        )
        while (steps := connection.recv()) is not None:
            loader.steps = steps
            synchronize(objects.device)
            began = perf_counter()
            samples = run_trainkit_loop(state, loader)
            synchronize(objects.device)
            connection.send((samples, perf_counter() - began, peak_memory(objects.device)))
    finally:
        session.close()


def settings_of_timed_steps(settings: Settings) -> Settings:
    """Return the settings without what ends a training: the timed steps are not the epochs of a run."""
    return replace(settings, scheduler={}, steps=None, max_minutes=None, on_nonfinite="stop", progress="off")


def _reason(error: BaseException) -> str:
    """Return the first line of an error, without the word `error`."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("error: ")

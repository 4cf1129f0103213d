"""Measure a training step: its phases, the same step in a loop written by hand, and the limit of the machine.

The loops take turns in one process, in several rounds. The medians of the rounds are reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainkit.build.session import Session, build_session
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.device import autocast, synchronize
from trainkit.core.errors import ConfigError
from trainkit.core.pytree import batch_size_of
from trainkit.diagnostics.batches import FixedStepsLoader
from trainkit.diagnostics.phases import run_trainkit_loop, time_phases
from trainkit.optim.rules import OptimizerOptions
from trainkit.training.state import State
from trainkit.training.step import accumulate_gradient

ROUNDS = 5
MIN_SHARE = 0.3  # fraction of a step from which a phase is a finding
SMALL_SHARE = 0.05  # a step below this fraction of the machine's limit is not bound by arithmetic
MIN_SECONDS = 0.01  # duration of a matrix product that is large enough to reach the limit of the machine
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench(session: Session, settings: Settings, steps: int) -> dict[str, Any]:
    """Measure a training. The session is useless afterwards.

    Args:
        session: built from the settings.
        settings: the settings of the training.
        steps: the number of timed steps of each loop.

    Returns:
        `samples_per_second` and `step` (seconds) of trainkit, of all `ranks` together; `batch_size`; `bare` and
        `by_hand`, the seconds of a step of a bare loop over the same objects (None if the step needs more) and of a
        loop written by hand (both None with several ranks); `phases`, the seconds of each phase; `flops` of a step on
        a rank (None if they cannot be counted); `limits`, the FLOP/s of a matrix product in some precisions, and
        `limit`, in the precision of the training; `peak_share`, the fraction of the limit that the step reaches;
        `findings`, what takes an unusual share.

    Raises:
        ConfigError: the training has a custom step.
    """
    custom = session.state.objects.training_step
    if custom is not None:
        cause = (
            f"bench: it times the supervised step beside a loop written by hand, and training_step is {custom.place}"
        )
        raise ConfigError(cause, hint="read samples_per_second in the history of a short run: epochs=1")
    steps_per_round = max(1, math.ceil(steps / ROUNDS))
    state, train = session.state, FixedStepsLoader(session.train, steps_per_round)
    loops = {"step": lambda: run_trainkit_loop(state, train)}
    ranks = state.objects.ranks
    if not (state.objects.needs_closure or state.objects.scaler or state.progress.micro_batch or ranks.are_several):
        loops["bare"] = lambda: run_bare_loop(state, train)
    if not ranks.are_several:  # the other loops are those of one process
        by_hand = build_session(settings_by_hand(settings))
        train_by_hand = FixedStepsLoader(by_hand.train, steps_per_round)
        loops["by_hand"] = lambda: run_bare_loop(by_hand.state, train_by_hand, read_loss=True)
    state.loaders = {"train": session.train}
    timings = run_rounds(state, train, loops)

    limits = matmul_limits(state.objects.device, settings.precision)
    limit, step, flops = limits[settings.precision], timings.loops["step"], count_flops(state, train)
    result: dict[str, Any] = {
        "samples_per_second": timings.batch_size / step,
        "step": step,
        "batch_size": timings.batch_size,
        "bare": timings.loops.get("bare"),
        "by_hand": timings.loops.get("by_hand"),
        "ranks": ranks.size,
        "phases": timings.phases,
        "flops": flops,
        "limits": limits,
        "limit": limit,
        "peak_share": flops / step / limit if flops else None,
    }
    return result | {"findings": findings(result, session)}


def findings(result: Mapping[str, Any], session: Session) -> list[str]:
    """Return which phases take an unusual share of the step, the largest share first.

    Args:
        result: the result of `bench`.
        session: the session that was measured.
    """
    total = sum(result["phases"].values())
    shares = {phase: seconds / total for phase, seconds in result["phases"].items()}
    compute = shares["forward"] + shares["backward"] + shares["step"]
    found = []
    if shares["loader"] >= MIN_SHARE:
        note = next((note for note in session.notes if note.startswith("training data")), "")
        reason = note.partition(";")[0].partition(": ")[2]
        found.append((shares["loader"], f"reading data takes {shares['loader']:.0%} of the step: {reason}"))
    if shares["transfer"] >= MIN_SHARE:
        cause = "mostly the augmentation (data.augment)" if session.train.prepare.augment else "the model is small"
        found.append((shares["transfer"], f"preparing batches takes {shares['transfer']:.0%} of the step: {cause}"))
    if (result["peak_share"] or 1.0) < SMALL_SHARE and compute >= MIN_SHARE:
        found.append((compute, "the model is small: most of the time is torch's overhead for each operation"))
    return [text for _, text in sorted(found, reverse=True)]


@dataclass
class Timings:
    """The medians of the rounds."""

    loops: dict[str, float]  # loop -> seconds of a step
    phases: dict[str, float]  # phase of trainkit's step -> seconds
    batch_size: float  # mean


def run_rounds(state: State, train: FixedStepsLoader, loops: Mapping[str, Callable[[], int]]) -> Timings:
    """Time the loops over several rounds, and the phases of trainkit's loop.

    In each round every loop runs once, so that changes in the speed of the machine affect all loops alike.

    Args:
        state: the state of the training.
        train: the batches of trainkit's loop.
        loops: each runs as many steps as `train` has batches, and returns the number of samples.
    """
    per_sample: dict[str, list[float]] = {name: [] for name in loops}
    phases: list[dict[str, float]] = []
    samples = 0
    for _ in range(ROUNDS + 1):
        for name, loop in loops.items():
            synchronize(state.objects.device)
            began = perf_counter()
            seen = loop()
            synchronize(state.objects.device)
            per_sample[name].append((perf_counter() - began) / seen)
            if name == "step":  # the loop of trainkit
                samples += seen
        phases.append(time_phases(state, train))
    batch_size = samples / ((ROUNDS + 1) * len(train))
    timed = phases[1:]  # the first round is a warm-up
    return Timings(
        {name: statistics.median(seconds[1:]) * batch_size for name, seconds in per_sample.items()},
        {name: statistics.median(seconds[name] for seconds in timed) / len(train) for name in timed[0]},
        batch_size,
    )


def settings_by_hand(settings: Settings) -> Settings:
    """Return the settings of a loop written by hand: a DataLoader without workers, nothing fused, float32."""
    optim = {}
    for name, node in settings.optim.items():
        fusable = "fused" in OptimizerOptions.from_signature(locate(node["_target_"]), {}).defaults
        optim[name] = node if not fusable or {"fused", "foreach"} & set(node) else {**node, "fused": False}
    return replace(
        settings,
        precision="fp32",
        memory_format="contiguous",
        compile=None,
        micro_batch=None,
        ema=None,
        data=replace(settings.data, cache="none", num_workers=0),
        optim=optim,
        hooks={},
    )


def run_bare_loop(state: State, loader: FixedStepsLoader, *, read_loss: bool = False) -> int:
    """Train for one pass over the loader with the five lines alone; return the number of samples.

    Args:
        state: the state of the training.
        loader: the loader of the training data.
        read_loss: read the loss with `.item()` at each step, which synchronizes the device.
    """
    model, loss_fn = state.objects.model, state.objects.loss_fn
    optimizer: Any = state.objects.optimizer
    state.begin_epoch()
    total, seen = 0.0, 0
    model.train()
    for inputs, targets in loader.batches():

        def closure(inputs: Any = inputs, targets: Any = targets) -> Any:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss

        samples = batch_size_of(inputs)
        if state.objects.needs_closure:
            loss = optimizer.step(closure)
        else:
            with state.objects.autocast:
                loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if read_loss:
            total += loss.item() * samples
        else:
            state.progress.loss.update(loss, weight=samples)
        seen += samples
    return seen


def count_flops(state: State, loader: FixedStepsLoader) -> int | None:
    """Return the FLOPs of the matrix products and convolutions of a forward and backward pass, as torch counts them.

    Returns None if torch cannot count them, as for compiled models.
    """
    inputs, targets = next(loader.batches())
    state.objects.optimizer.zero_grad()
    try:
        with FlopCounterMode(display=False) as counter:
            accumulate_gradient(state, inputs, targets)
    except Exception:  # the counter cannot look into compiled models
        return None
    return int(counter.get_total_flops()) or None


def matmul_limits(device: torch.device, precision: str) -> dict[str, float]:
    """Return the FLOP/s of a large matrix product in fp32, in bf16 and in `precision`."""
    limits: dict[str, float] = {}
    for name in dict.fromkeys(("fp32", "bf16", precision)):
        with autocast(name, device):  # sets whether fp32 may use tf32
            size, seconds = 256, 0.0
            while seconds < MIN_SECONDS:
                size *= 2
                matrix = torch.ones((size, size), dtype=DTYPES[name], device=device)
                seconds = min(_matmul_seconds(matrix) for _ in range(3))
                limits[name] = max(limits.get(name, 0.0), 2 * size**3 / seconds)
    autocast(precision, device)  # restores the setting of tf32
    return limits


def _matmul_seconds(matrix: torch.Tensor) -> float:
    synchronize(matrix.device)
    began = perf_counter()
    matrix @ matrix
    synchronize(matrix.device)
    return perf_counter() - began

"""Where a training step's time goes, against the same loop by hand and what the machine can do.

All is measured interleaved in one process, in rounds; the medians are reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainkit.build import session as build
from trainkit.build.session import Session
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.core.device import autocast, synchronize
from trainkit.core.pytree import batch_size_of
from trainkit.data.loaders import Loader, StreamingLoader
from trainkit.data.prepare import Batch, Prepare
from trainkit.optim.rules import OptimizerOptions
from trainkit.training.loop import train_epoch
from trainkit.training.losses import denominator
from trainkit.training.state import State
from trainkit.training.step import before_update, loss_in_parts, update

ROUNDS = 5
BOUND = 0.3  # the share of a step from which something is worth changing
ENOUGH = 0.01  # seconds of a matrix product that is large enough to show the machine's limit
SMALL = 0.05  # the share of the machine's limit below which a step is not bound by arithmetic
PHASES = ("loader", "transfer", "forward", "backward", "step")


class LimitedLoader:
    """A loader's next batches as an epoch of their own; the data begins again where it ends."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.loader, self.steps = loader, steps
        self.samples, self.unreadable, self.prepare = loader.samples, loader.unreadable, loader.prepare
        self.endless = self._endless()

    def _endless(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.loader.batches(epoch)
            epoch += 1

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:  # noqa: ARG002
        """The next few."""
        return (next(self.endless) for _ in range(self.steps))

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:  # noqa: ARG002
        """Its batches are not those of an epoch."""
        return "of those timed"

    def example(self) -> Batch:
        """See `Loader`."""
        return self.loader.example()

    def close(self) -> None:
        """See `Loader`."""
        self.loader.close()


def bench(session: Session, settings: Settings, steps: int) -> dict[str, Any]:
    """Measure a training, which is of no use afterwards.

    Args:
        session: what the config builds.
        settings: of the training.
        steps: how many are timed of each loop.

    Returns:
        `samples_per_second` and `step` (seconds) of trainkit; `bare`, of a bare loop over the same parts, and
        `by_hand`, of a tutorial's (None where there is none); `phases` (seconds each, the device waited for
        after each); `flops` of a step, `limit` (operations a second of a matrix product in this precision)
        and `limits` of others; `peak_share`, of the limit that the step reaches; `advice`.
    """
    few = max(1, math.ceil(steps / ROUNDS))
    train = LimitedLoader(session.train, few)
    loops: dict[str, Callable[[], int]] = {"trainkit": lambda: whole_loop(session.state, train)}
    if not (session.state.objects.needs_closure or session.state.objects.scaler or session.state.progress.micro_batch):
        loops["bare"] = lambda: bare_loop(session.state, train)
    plain = build.build_session(write_by_hand(settings))
    plain_train = LimitedLoader(plain.train, few)
    loops["by hand"] = lambda: bare_loop(plain.state, plain_train, item=True)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    phases: dict[str, list[float]] = {name: [] for name in PHASES}
    samples = 0
    for number in range(ROUNDS + 1):  # the first warms up
        for name, loop in loops.items():
            synchronize(session.state.objects.device)
            began = perf_counter()
            seen = loop()
            synchronize(session.state.objects.device)
            if number:
                seconds[name].append((perf_counter() - began) / seen)
                samples += seen * (name == "trainkit")
        for name, spent in phases_of(session.state, train).items():
            if number:
                phases[name].append(spent / few)
    per_sample = {name: statistics.median(times) for name, times in seconds.items()}
    size = samples / (ROUNDS * few)
    found: dict[str, Any] = {
        "samples_per_second": 1 / per_sample["trainkit"],
        "step": per_sample["trainkit"] * size,
        "batch_size": size,
        "bare": per_sample["bare"] * size if "bare" in per_sample else None,
        "by_hand": per_sample["by hand"] * size,
        "phases": {name: statistics.median(times) for name, times in phases.items()},
        "flops": flops(session.state, train),
        "limits": limits(session.state.objects.device, settings.precision),
    }
    found["limit"] = found["limits"][settings.precision]
    found["peak_share"] = found["flops"] / found["step"] / found["limit"] if found["flops"] else None
    found["advice"] = advice(found, session)
    return found


def write_by_hand(settings: Settings) -> Settings:
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


def whole_loop(state: State, loader: LimitedLoader) -> int:
    """The loop of a training over a few batches; how many samples it saw."""
    state.begin_epoch()
    state.progress.batches = len(loader)
    train_epoch(state, loader, [])
    return state.progress.seen


def bare_loop(state: State, loader: LimitedLoader, *, item: bool = False) -> int:
    """The five lines by themselves, the loss read each step with `item`; how many samples it saw."""
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

        size = batch_size_of(inputs)
        if state.objects.needs_closure:
            loss = optimizer.step(closure)
        else:
            with state.objects.autocast:
                loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if item:
            total += loss.item() * size
        else:
            state.progress.loss.update(loss, weight=size)
        seen += size
    return seen


def phases_of(state: State, loader: LimitedLoader) -> dict[str, float]:
    """The seconds of each phase over a few steps; the device is waited for after each."""
    spent = dict.fromkeys(PHASES, 0.0)
    timed = Timed(loader.loader.prepare)
    loader.loader.prepare = timed  # type: ignore[assignment]
    state.begin_epoch()
    batches = loader.batches()
    clock = perf_counter()

    def lap(phase: str) -> None:
        nonlocal clock
        synchronize(state.objects.device)
        now = perf_counter()
        spent[phase] += now - clock
        clock = now

    state.objects.model.train()
    state.objects.loss_fn.train()
    try:
        while (batch := next(batches, None)) is not None:
            lap("loader")
            inputs, targets = batch
            weight = denominator(state.objects.loss_fn, targets, batch_size_of(inputs))
            if (
                state.objects.needs_closure
                or state.objects.scaler is not None
                or state.progress.micro_batch is not None
            ):
                state.objects.optimizer.zero_grad()
                loss = loss_in_parts(state, inputs, targets)
                lap("backward")  # and forward: it goes part by part
            else:
                with state.objects.autocast:
                    loss = state.loss_fn(state.model(inputs), targets)
                lap("forward")
                state.objects.optimizer.zero_grad()
                loss.backward()
                lap("backward")
            before_update(state, loss, weight)
            if state.objects.needs_closure:
                step: Any = state.objects.optimizer.step
                step(lambda: loss)  # noqa: B023  # it is called at once
            else:
                update(state)
            state.progress.loss.update(loss, weight=weight)
            lap("step")
    finally:
        loader.loader.prepare = timed.prepare
    spent["transfer"] = timed.seconds
    spent["loader"] -= timed.seconds
    return spent


class Timed:
    """A `Prepare` whose time is taken."""

    def __init__(self, prepare: Prepare) -> None:
        self.prepare, self.seconds = prepare, 0.0

    def __call__(self, *batch: Any) -> Batch:
        """Prepare a batch."""
        began = perf_counter()
        prepared = self.prepare(*batch)
        synchronize(self.prepare.device)
        self.seconds += perf_counter() - began
        return prepared

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prepare, name)


def flops(state: State, loader: LimitedLoader) -> int | None:
    """The floating-point operations of a step's matrix products and convolutions, as torch counts them."""
    inputs, targets = next(loader.batches())
    state.objects.optimizer.zero_grad()
    try:
        with FlopCounterMode(display=False) as counter, state.objects.autocast:
            loss = state.loss_fn(state.model(inputs), targets)
            loss.backward()
    except Exception:  # compiled models cannot be looked into
        return None
    return int(counter.get_total_flops()) or None


def limits(device: torch.device, precision: str) -> dict[str, float]:
    """The operations a second of a large matrix product in fp32, in bf16 and in `precision`, the best of a few."""
    types = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    found: dict[str, float] = {}
    for name in dict.fromkeys(("fp32", "bf16", precision)):
        with autocast(name, device):  # which says whether tf32 is allowed
            size, seconds = 256, 0.0
            while seconds < ENOUGH:
                size *= 2
                one = torch.ones((size, size), dtype=types[name], device=device)
                seconds = min(_seconds(lambda one=one: one @ one, device) for _ in range(3))  # type: ignore[misc]
                found[name] = max(found.get(name, 0.0), 2 * size**3 / seconds)
    autocast(precision, device)
    return found


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - began


def advice(found: dict[str, Any], session: Session) -> list[str]:
    """What to change, the largest first."""
    total = sum(found["phases"].values())
    shares = {name: seconds / total for name, seconds in found["phases"].items()}
    told: dict[str, float] = {}
    if shares["loader"] >= BOUND:
        words = f"the loader is the bound: {shares['loader']:.0%} of the step; {faster(session)}"
        told[words] = shares["loader"]
    if shares["transfer"] >= BOUND:
        cost = "data.augment is what costs most of it" if session.train.prepare.augment else "the model is small"
        told[f"preparing batches takes {shares['transfer']:.0%} of the step: {cost}"] = shares["transfer"]
    precision = session.settings.precision
    reached, compute = found["peak_share"], shares["forward"] + shares["backward"]
    quicker = found["limits"]["bf16"] / found["limits"]["fp32"]
    if reached is not None and reached >= BOUND and precision == "fp32" and quicker > 1.3:
        words = f"precision=bf16: matrix products are {quicker:.1f} times as fast here in bf16 as in fp32"
        told[words] = compute
    if found["limit"] < found["limits"]["fp32"]:
        slower = found["limits"]["fp32"] / found["limit"]
        told[f"precision=fp32: matrix products in {precision} are {slower:.1f} times as slow here"] = 1.0
    if reached is not None and reached < SMALL and compute + shares["step"] >= BOUND and not session.settings.compile:
        words = "the model is small: most of a step is what torch does around its operations"
        words += "; try compile=true, which fuses some"
        told[words] = 1 - shares["loader"] - shares["transfer"]
    return sorted(told, key=lambda words: told[words], reverse=True)


def faster(session: Session) -> str:
    """What to change where the loader is the bound."""
    if not isinstance(session.train, StreamingLoader):
        return "a larger batch_size reads more at once, and is other mathematics"
    note = next((note for note in session.notes if note.startswith("training data")), "")
    if session.settings.data.cache in (None, "none"):
        return "data.cache=auto holds the samples, if they are always the same"
    reason = note.partition(";")[0].rpartition(": ")[2]
    if not session.settings.data.num_workers:
        return f"data.num_workers=2 reads beside it ({reason})"
    return f"more data.num_workers, or smaller files ({reason})"

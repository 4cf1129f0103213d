"""Advice on how to make a measured training faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainkit.build.session import Session
from trainkit.data.loaders import StreamingLoader

MIN_SHARE = 0.3  # fraction of a step from which a phase is worth a change
MIN_SPEEDUP = 1.3  # of bf16 over fp32
SMALL_SHARE = 0.05  # a step below this fraction of the machine's limit is not bound by arithmetic


def advice(result: Mapping[str, Any], session: Session) -> list[str]:
    """Return what to change, the largest share of the time first.

    Args:
        result: the result of `bench`.
        session: the session that was measured.
    """
    settings, precision = session.settings, session.settings.precision
    total = sum(result["phases"].values())
    shares = {phase: seconds / total for phase, seconds in result["phases"].items()}
    compute = shares["forward"] + shares["backward"]
    limits, peak_share = result["limits"], result["peak_share"]
    items: list[tuple[float, str]] = []
    if shares["loader"] >= MIN_SHARE:
        text = f"the loader limits the speed: {shares['loader']:.0%} of the step; {loader_advice(session)}"
        items.append((shares["loader"], text))
    if shares["transfer"] >= MIN_SHARE:
        cause = (
            "mostly the augmentation (data.augment)"
            if session.train.prepare.augment
            else "the model is small, so this is a large share"
        )
        items.append((shares["transfer"], f"preparing batches takes {shares['transfer']:.0%} of the step: {cause}"))
    speedup = limits["bf16"] / limits["fp32"]
    if precision == "fp32" and speedup > MIN_SPEEDUP and peak_share is not None and peak_share >= MIN_SHARE:
        text = f"set precision=bf16: on this device bf16 matrix products are {speedup:.1f} times as fast as fp32"
        items.append((compute, text))
    if limits[precision] < limits["fp32"]:
        slowdown = limits["fp32"] / limits[precision]
        text = (
            f"set precision=fp32: on this device fp32 matrix products are {slowdown:.1f} times as fast as {precision}"
        )
        items.append((1.0, text))  # always first
    small = peak_share is not None and peak_share < SMALL_SHARE
    if small and compute + shares["step"] >= MIN_SHARE and not settings.compile:
        text = "the model is small, so most of the time is torch's overhead per operation"
        items.append((compute + shares["step"], f"{text}; try compile=true, which fuses operations"))
    return [text for _, text in sorted(items, key=lambda item: item[0], reverse=True)]


def loader_advice(session: Session) -> str:
    """Return what to change if the loader limits the speed."""
    data = session.settings.data
    if not isinstance(session.train, StreamingLoader):
        return "a larger batch_size loads more samples at once, but changes the training"
    if data.cache in (None, "none"):
        return "data.cache=auto keeps the samples in memory if they are the same in each epoch"
    note = next((note for note in session.notes if note.startswith("training data")), "")
    reason = note.partition(";")[0].rpartition(": ")[2]
    if not data.num_workers:
        return f"data.num_workers=2 loads samples in the background ({reason})"
    return f"raise data.num_workers, or make the files smaller ({reason})"

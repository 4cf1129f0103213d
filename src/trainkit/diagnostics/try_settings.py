"""Try the settings that may make a training faster: each in turn with the present settings, in several rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from trainkit.config.settings import Settings
from trainkit.diagnostics.choices import Choice, choices
from trainkit.diagnostics.trial import Trial, TrialError

ROUNDS = 7
ROUND_SECONDS = 0.5  # of steps in a round, at least one step
MAX_CONFIRMED = 4  # choices that are tried again
MIN_GAIN = 1.02  # a ratio from which a choice counts as faster; less may be the noise of the machine


@dataclass
class Result:
    """A choice that was tried.

    Attributes:
        choice: what was tried.
        samples_per_second: the median of the rounds.
        ratio: the median of the speed over that of the present settings in the same round.
        low: the lower quartile of these ratios.
        memory: the peak memory in bytes.
        loss_difference: the largest relative difference of the loss in the first steps.
        error: why the choice cannot be used; '': it can.
    """

    choice: Choice
    samples_per_second: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    memory: int = 0
    loss_difference: float = 0.0
    error: str = ""

    @property
    def is_faster(self) -> bool:
        """Whether the choice is clearly faster than the present settings."""
        return self.ratio >= MIN_GAIN and self.low >= 1.0


@dataclass
class Trials:
    """All results: the present settings first, then those that were tried.

    Attributes:
        results: of all choices.
        same: the fastest choice with the same mathematics; None: the present settings are.
        lower: the fastest choice with a lower precision, if it is faster than `same`.
    """

    results: list[Result]
    same: Result | None
    lower: Result | None


def try_settings(
    settings: Settings,
    words: Sequence[str],
    config_dir: str | None,
    on_try: Callable[[Choice], object] = lambda _: None,
) -> Trials:
    """Try what may be faster: first one change at a time, then the faster ones together.

    The fastest is tried again in a new process. If it is not the fastest then, the next one is tried again.

    Args:
        settings: the present settings.
        words: the overrides of the command line.
        config_dir: the value of `--config-dir`.
        on_try: is called before a choice is tried.

    Raises:
        TrialError: the present settings cannot be trained.
    """
    with closing(Trial(words, config_dir, Choice())) as present:
        present.begin()
        speed = present.time_steps(3)
        steps = max(1, round(ROUND_SECONDS * speed / settings.batch_size))
        base = Result(Choice(), statistics.median(present.time_steps(steps) for _ in range(3)), 1.0, 1.0)
        tried: dict[Choice, Result] = {}

        def measure(choice: Choice, *, again: bool = False) -> Result:
            if choice not in tried or again:
                on_try(choice)
                tried[choice] = compare(present, Trial(words, config_dir, choice), steps)
            return tried[choice]

        def fastest(start: Result | None, *, lower: bool) -> Result | None:
            confirmed: set[Choice] = set()
            while True:
                best = combine(start, [tried[choice] for choice in single if choice.lowers_precision == lower], measure)
                if best is None or best is start or best.choice in confirmed:
                    return best
                if len(confirmed) == MAX_CONFIRMED:
                    return start
                measure(best.choice, again=True)
                confirmed.add(best.choice)

        single = [*choices(settings, present.facts)]
        for choice in single:
            measure(choice)
        same = fastest(None, lower=False)
        lower = fastest(same, lower=True)
        base.memory = present.memory
    return Trials([base, *tried.values()], same, None if lower is same else lower)


def combine(start: Result | None, results: Sequence[Result], measure: Callable[[Choice], Result]) -> Result | None:
    """Add the faster choices to a start, the fastest first; keep each that makes the whole faster.

    Args:
        start: the choices so far; None: the present settings.
        results: of single choices.
        measure: tries a combination.
    """
    best = start
    faster = [result for result in results if result.is_faster]
    for result in sorted(faster, key=lambda result: result.ratio, reverse=True):
        together = result.choice if best is None else best.choice.with_choice(result.choice)
        if together is None:
            continue
        measured = measure(together)
        for candidate in (result, measured):
            if candidate.is_faster and (best is None or candidate.ratio >= best.ratio * MIN_GAIN):
                best = candidate
    return best


def compare(present: Trial, other: Trial, steps: int) -> Result:
    """Time a choice in turn with the present settings.

    Args:
        present: the process with the present settings.
        other: the process with the choice.
        steps: of a round.
    """
    speeds = []
    with closing(other):
        try:
            facts = other.begin()
            other.time_steps(steps)  # a warm-up
        except TrialError as error:
            return Result(other.choice, error=str(error))
        for _ in range(ROUNDS):
            before = present.time_steps(steps)
            try:
                speeds.append((before, other.time_steps(steps)))
            except TrialError as error:
                return Result(other.choice, error=str(error))
        ratios = [speed / before for before, speed in speeds]
        pairs = zip(present.facts.losses, facts.losses, strict=True)
        return Result(
            other.choice,
            samples_per_second=statistics.median(speed for _, speed in speeds),
            ratio=statistics.median(ratios),
            low=statistics.quantiles(ratios, n=4, method="inclusive")[0] if len(ratios) > 1 else ratios[0],
            memory=other.memory,
            loss_difference=max((abs(ours - theirs) / abs(ours or 1.0) for ours, theirs in pairs), key=_nan_is_largest),
        )


def _nan_is_largest(number: float) -> float:
    return math.inf if math.isnan(number) else number

"""`trainkit bench --try`: which settings are tried, how they are compared, and which are the fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing

import pytest

from tests.helpers import compose_settings
from trainkit.cli.commands.bench import trial_lines, trials_as_json
from trainkit.diagnostics import try_settings as module
from trainkit.diagnostics.choices import Choice, Facts, choices
from trainkit.diagnostics.trial import Trial, TrialError
from trainkit.diagnostics.try_settings import Result, Trials, combine, try_settings

FACTS = Facts(
    device="cpu",
    threads=2,
    cores=2,
    memory_format=None,
    is_streamed=False,
    may_split=True,
    losses=(1.0,),
    memory=1,
)


def tried(*overrides: str, **facts: object) -> list[str]:
    return list(map(str, choices(compose_settings(list(overrides)), dataclasses.replace(FACTS, **facts))))  # type: ignore[arg-type]


def result(choice: Choice, ratio: float) -> Result:
    return Result(choice, samples_per_second=100 * ratio, ratio=ratio, low=ratio, memory=2**20)


def speeds(ratios: dict[str, float]) -> Callable[[Choice], Result]:
    """Return a function that measures a combination as the product of its parts, or as `ratios` says."""

    def measure(choice: Choice) -> Result:
        return result(choice, ratios[str(choice)])

    return measure


# --------------------------------------------------------------------------------------- what is tried


def test_only_settings_that_the_training_has_are_tried() -> None:
    plain = tried("model=mlp")
    assert not any(text.startswith(("memory_format", "data.num_workers")) for text in plain)
    assert "memory_format=contiguous" in tried(memory_format="channels_last")
    assert "memory_format=channels_last" in tried(memory_format="contiguous")
    assert {"data.num_workers=1", "data.num_workers=2"} <= set(tried("model=mlp", is_streamed=True))


def test_a_setting_that_is_set_already_is_not_tried() -> None:
    assert "memory_format=contiguous" not in tried("memory_format=contiguous", memory_format="contiguous")
    assert not any(text.startswith("compile") for text in tried("compile=true"))
    assert not any(text.startswith("precision") for text in tried("precision=bf16"))
    assert not any("foreach" in text or "fused" in text for text in tried("+optim.fused=true"))
    assert not any(text.startswith("micro_batch") for text in tried("micro_batch=4"))
    assert "OMP_NUM_THREADS=2" not in tried()


def test_a_batch_that_may_not_be_split_is_tried_whole() -> None:
    assert not any(text.startswith("micro_batch") for text in tried(may_split=False))


def test_every_override_that_is_tried_composes() -> None:
    for base in (["model=mlp"], ["optim=adamw"], ["optim=muon_sgd"], ["data.cache=none"]):
        for choice in choices(
            compose_settings(base), dataclasses.replace(FACTS, memory_format="contiguous", is_streamed=True)
        ):
            compose_settings([*base, *choice.overrides])


def test_only_a_precision_changes_more_than_the_rounding() -> None:
    lower = [choice for choice in choices(compose_settings([]), FACTS) if choice.lowers_precision]
    assert [str(choice) for choice in lower] == ["precision=bf16"]


# ------------------------------------------------------------------------------------------ the fastest


def test_choices_are_combined_as_long_as_the_whole_gets_faster() -> None:
    a, b, c = Choice(("a=1",)), Choice(("b=1",)), Choice(("c=1",))
    measure = speeds({"a=1": 1.5, "a=1 b=1": 1.8, "a=1 b=1 c=1": 1.7})
    best = combine(None, [result(b, 1.2), result(a, 1.5), result(c, 1.1)], measure)
    assert best is not None
    assert str(best.choice) == "a=1 b=1"


def test_a_choice_within_the_noise_is_not_faster() -> None:
    assert combine(None, [result(Choice(("a=1",)), 1.01)], speeds({})) is None


def test_a_choice_that_is_slower_in_some_rounds_is_not_faster() -> None:
    noisy = Result(Choice(("a=1",)), ratio=1.3, low=0.9)
    assert combine(None, [noisy], speeds({})) is None


class FakeTrial:
    """A process whose speeds are those of a table: one ratio for each time that a choice is tried."""

    ratios: dict[str, list[float]]

    def __init__(self, words: Sequence[str], config_dir: str | None, choice: Choice) -> None:  # noqa: ARG002
        self.choice, self.facts, self.memory = choice, FACTS, 2**20
        own = self.ratios.get(str(choice))
        self.ratio = own.pop(0) if own else 1.0

    def begin(self) -> Facts:
        return self.facts

    def time_steps(self, steps: int) -> float:  # noqa: ARG002
        return 1000 * self.ratio

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("ratios", "same", "lower"),
    [
        ({"a=1": [1.3, 1.3], "b=1": [1.1, 1.1], "a=1 b=1": [1.4, 1.4]}, "a=1 b=1", None),
        ({"a=1": [1.3, 0.9], "b=1": [1.1, 1.1], "a=1 b=1": [1.0]}, "b=1", None),  # a was fast by chance
        ({"a=1": [1.3, 1.0], "b=1": [1.1, 1.0], "a=1 b=1": [1.0]}, None, None),
        ({"a=1": [1.5, 1.03], "b=1": [1.4, 1.4], "a=1 b=1": [1.0], "b=1 a=1": [1.0]}, "b=1", None),
        ({"precision=bf16": [1.5, 1.5]}, None, "precision=bf16"),
        ({"a=1": [1.3, 1.3], "precision=bf16": [1.5, 1.2], "a=1 precision=bf16": [1.2]}, "a=1", None),
    ],
)
def test_the_fastest_is_tried_again_and_left_out_if_it_was_fast_by_chance(
    ratios: dict[str, list[float]], same: str | None, lower: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeTrial.ratios = ratios
    found = [Choice((text,)) for text in ("a=1", "b=1", "precision=bf16")]
    monkeypatch.setattr(module, "choices", lambda *_: found)
    monkeypatch.setattr(module, "Trial", FakeTrial)
    trials = try_settings(compose_settings(["model=mlp"]), ["model=mlp"], None)
    assert [None if result is None else str(result.choice) for result in (trials.same, trials.lower)] == [same, lower]


def test_two_values_of_a_key_are_not_combined() -> None:
    first, second = Choice(("micro_batch=8",)), Choice(("micro_batch=4",))
    best = combine(None, [result(first, 1.3), result(second, 1.2)], speeds({"micro_batch=8": 1.3}))
    assert best is not None
    assert best.choice == first


def test_a_lower_precision_alone_is_chosen_if_it_is_faster_than_with_the_other_settings() -> None:
    same = result(Choice(("compile=true",)), 1.2)
    bf16 = result(Choice(("precision=bf16",)), 1.6)
    best = combine(same, [bf16], speeds({"compile=true precision=bf16": 1.1}))
    assert best is bf16


def test_a_lower_precision_that_is_slower_leaves_the_fastest_settings() -> None:
    same = result(Choice(("compile=true",)), 1.2)
    slow = result(Choice(("precision=bf16",)), 0.5)
    assert combine(same, [slow], speeds({"compile=true precision=bf16": 0.6})) is same


# ------------------------------------------------------------------------------------------- processes


def test_a_choice_with_the_same_mathematics_has_the_same_losses() -> None:
    with (
        closing(Trial(["model=mlp"], None, Choice(threads=1))) as present,
        closing(Trial(["model=mlp"], None, Choice(("micro_batch=16",), threads=1))) as other,
    ):
        ours, theirs = present.begin(), other.begin()
        assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
        assert theirs.threads == 1
        assert min(present.time_steps(2), other.time_steps(2), other.memory) > 0
    assert not other.process.is_alive()


def test_a_choice_that_is_impossible_says_why() -> None:
    trial = Trial(["model=mlp"], None, Choice(("device=cuda",)))
    with closing(trial), pytest.raises(TrialError, match="device=cuda: this machine has"):
        trial.begin()


@pytest.mark.slow
def test_trying_measures_every_choice_against_the_present_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_few(*_: object) -> Sequence[Choice]:
        return Choice(("micro_batch=16",)), Choice(("device=cuda",)), Choice(("precision=bf16",))

    monkeypatch.setattr(module, "choices", of_a_few)
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.01)
    trials = try_settings(compose_settings(["model=mlp"]), ["model=mlp"], None)
    present, whole, impossible, lower = trials.results[:4]
    assert present.ratio == 1.0
    assert whole.loss_difference < 1e-5 < lower.loss_difference
    assert "device=cuda" in impossible.error


# --------------------------------------------------------------------------------------------- output


def test_the_table_has_the_fastest_first_and_names_the_overrides_to_use() -> None:
    fast, slow = result(Choice(("compile=true",), threads=1), 1.5), result(Choice(("micro_batch=8",)), 0.5)
    broken = Result(Choice(("precision=bf16",)), error="no kernel")
    trials = Trials([result(Choice(), 1.0), slow, fast, broken], fast, None)
    lines = trial_lines(trials)
    assert [line.split("  ")[0] for line in lines[1:4]] == ["as it is", str(fast.choice), str(slow.choice)]
    assert "precision=bf16: impossible: no kernel" in lines
    assert "fastest with the same mathematics: OMP_NUM_THREADS=1 compile=true (1.50 times as fast)" in lines
    assert trials_as_json(trials)["same"]["overrides"] == ["compile=true"]

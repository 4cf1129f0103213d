"""Words that the shell splits at spaces, and lists for a group of one choice."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.config.test_compose import problems_of
from trainkit import compose
from trainkit.config.compose import compose_sweep
from trainkit.config.split_words import find_split_words
from trainkit.core.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "repaired"),
    [
        ("optim=sgd, adam", "'optim=sgd,adam'"),
        ("optim=sgd , adam", "'optim=sgd,adam'"),
        ("lr=0.1 0.01", "-m lr=0.1,0.01"),
        ("param_groups=[mine, no_decay]", "'param_groups=[mine,no_decay]'"),
        ("data.drop=[id, age]", "'data.drop=[id,age]'"),
        ("+param_groups.head={module: head, lr_mult: 10}", "'+param_groups.head={module: head, lr_mult: 10}'"),
        ("epochs = 3", "write epochs=3, without spaces"),
        ("epochs =3", "write epochs=3, without spaces"),
        ("epochs= 3", "write epochs=3, without spaces"),
        ("optim = sgd, adam", "write optim=sgd,adam, without spaces"),
    ],
)
def test_a_value_with_spaces_gives_one_error_with_the_repaired_word(line: str, repaired: str) -> None:
    (problem,) = problems_of("seed=1", *shlex.split(line), "batch_size=8")
    cause, hint = problem.splitlines()
    assert cause.startswith(f"error: {line}: ")
    assert repaired in hint


def test_a_sweep_reports_a_value_with_spaces_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_sweep(["optim=sgd,", "adam", "lr=0.1,0.2"])
    assert [problem.cause.partition(":")[0] for problem in caught.value.problems] == ["optim=sgd, adam"]


@pytest.mark.parametrize(
    "words", [["lr=0.1", "epochs=3"], ["lr=0.1", "seed"], ["a={b: 1, c: [2, 3]}", "~hooks.x"], ["x="]]
)
def test_whole_words_are_not_joined(words: list[str]) -> None:
    assert find_split_words(words) == []


def test_the_hint_to_add_a_key_can_be_pasted_into_a_shell() -> None:
    word = "param_groups.head={module: head, lr_mult: 10}"
    (problem,) = problems_of(word)
    pasted = problem.partition("to add a new key write ")[2]
    assert shlex.split(pasted) == [f"+{word}"]


@pytest.mark.parametrize("choices", ["optim=[sgd,adam]", "model=[mlp, toy_cnn]"])
def test_a_list_for_a_group_of_one_choice_is_the_only_error(choices: str) -> None:
    (problem,) = problems_of(choices)
    group = choices.partition("=")[0]
    assert f"{group} takes one choice" in problem
    assert f"-m {choices.replace('[', '').replace(']', '').replace(' ', '')}" in problem


def test_choices_with_named_optimizers_may_be_merged(here: Path) -> None:
    (here / "conf" / "optim").mkdir(parents=True)
    for name in ("body", "head"):
        text = f"{name}: {{_target_: torch.optim.SGD, lr: 0.1, params: {name}}}\n"
        (here / "conf" / "optim" / f"my_{name}.yaml").write_text(text)
    assert set(compose(["optim=[my_body,my_head]"]).optim) >= {"body", "head"}

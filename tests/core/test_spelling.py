"""Suggestions for misspelt names."""

from __future__ import annotations

import pytest

from trainkit.core.spelling import did_you_mean, nearest


@pytest.mark.parametrize(
    ("word", "names", "expected"),
    [
        ("momentun", ["momentum", "lr"], "momentum"),
        ("conv2D", ["Conv2d", "Conv1d"], "Conv2d"),
        ("torch.nn.Linaer", ["torch.nn.modules.Linear"], "torch.nn.modules.Linear"),
        ("adma", ["adamax", "adam", "adamw"], "adam"),
        ("aadm", ["adamax", "adam"], "adam"),
        ("x", ["momentum"], None),
        ("x", [], None),
    ],
)
def test_the_nearest_name_is_found(word: str, names: list[str], expected: str | None) -> None:
    assert nearest(word, names) == expected


def test_the_hint_has_the_nearest_name_or_all_names() -> None:
    assert did_you_mean("momentun", ["momentum"], "write ", "=VALUE") == "did you mean write momentum=VALUE?"
    assert did_you_mean("x", ["momentum", True]) == "choose from: momentum, true"
    assert did_you_mean("x", ["momentum", "nesterov"], limit=1) == "choose from: momentum, …"
    assert did_you_mean("x", []) == ""

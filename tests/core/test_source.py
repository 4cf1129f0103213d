"""Messages name the file and the line of a user's code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainkit.core.source import where_defined


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Base:
    def __getitem__(self, index: int) -> int:
        return index

    @decorated
    def wrapped(self) -> None: ...


class Child(Base, dict[str, int]): ...


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(text))


def test_classes_instances_and_functions_are_found() -> None:
    assert where_defined(Base) == where_defined(Base()) == f"{__file__}, line {line_of('class Base')}"
    assert where_defined(line_of) == f"{__file__}, line {line_of('def line_of')}"


def test_a_method_has_its_own_line_also_if_it_is_inherited_or_decorated() -> None:
    line = line_of("class Base")
    assert where_defined(Child(), "__getitem__") == f"{__file__}, line {line + 1}"
    assert where_defined(Base, "wrapped") == f"{__file__}, line {line + 4}"


def test_a_class_without_the_method_in_python_gives_the_line_of_the_class() -> None:
    assert where_defined(Child(), "__len__") == where_defined(Child(), "missing") == where_defined(Child)


@pytest.mark.parametrize("obj", [{}, [1], len, 3, None, type("Made", (), {})])
def test_code_without_a_source_file_gives_an_empty_text(obj: Any) -> None:
    assert where_defined(obj) == where_defined(obj, "__getitem__") == ""

"""The place where an object's code is defined, for messages."""

from __future__ import annotations

import inspect
import site
from pathlib import Path
from typing import Any


def where_defined(obj: Any, method: str = "") -> str:
    """Return where the code of an object is defined: "PATH, line N", or "" if the code has no source file.

    Args:
        obj: a class, a function, or an instance of a class.
        method: a method of the class, such as `__getitem__`. Its line is returned if the class has it in Python.
    """
    kind = obj if isinstance(obj, type) or inspect.isroutine(obj) else type(obj)
    found = inspect.unwrap(getattr(kind, method, kind) if method else kind)
    if not hasattr(found, "__code__"):  # a class, or a method in C
        found = kind
    try:
        file = inspect.getsourcefile(found)
        line = inspect.getsourcelines(found)[1]
    except (TypeError, OSError):  # builtin, or defined in an interactive session
        return ""
    return f"{file}, line {line}" if file else ""


def name_and_place(obj: Any, method: str = "forward") -> str:
    """Return the dotted name of an object's class, or of a function, with the place of its code in brackets."""
    obj = getattr(obj, "wrapped_function", obj)  # of a `FunctionLoss`
    named = obj if isinstance(obj, type) or inspect.isroutine(obj) else type(obj)
    foreign = (*site.getsitepackages(), str(Path(__file__).parents[1]))
    places = [where_defined(named, method), where_defined(named)] if isinstance(named, type) else [where_defined(named)]
    # A custom class may inherit the method from a package.
    place = next((place for place in places if place and not place.startswith(foreign)), "")
    name = f"{named.__module__}.{named.__qualname__}"
    return f"{name} ({place})" if place else name


def without_partial(function: Any) -> Any:
    """Return the function of a `functools.partial`, or any other object as it is."""
    return getattr(function, "func", function)

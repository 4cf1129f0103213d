"""The place where an object's code is defined, for messages."""

from __future__ import annotations

import inspect
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


def describe_class(obj: Any, method: str = "") -> str:
    """Return the name of an object's class and where it is defined, such as "Birds (PATH, line 12)"."""
    where = where_defined(type(obj), method)
    return type(obj).__name__ + (f" ({where})" if where else "")

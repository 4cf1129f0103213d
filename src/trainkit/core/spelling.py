"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: str, among: Iterable[str]) -> str | None:
    """The spelling among those given that is closest to `word`, if one is close.

    Case is forgiven first, then letters, then a missing or wrong prefix of a dotted path.
    """
    names = sorted(set(among))
    folded = difflib.get_close_matches(word.casefold(), {name.casefold() for name in names}, n=1, cutoff=0.6)
    if folded:
        return max(
            (name for name in names if name.casefold() == folded[0]),
            key=lambda name: difflib.SequenceMatcher(None, word, name).ratio(),
        )
    leaf = word.rpartition(".")[2].casefold()
    leaves = {name.rpartition(".")[2].casefold(): name for name in reversed(names)}
    found = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    return leaves[found[0]] if found else None


def did_you_mean(word: str, among: Iterable[Any], prefix: str = "", suffix: str = "", limit: int = 24) -> str:
    """A line with the nearest valid spelling, or all of them where none is near and they are few."""
    names = sorted({str(name).lower() if isinstance(name, bool) else str(name) for name in among})
    close = nearest(word, names)
    if close is not None:
        return f"did you mean {prefix}{close}{suffix}?"
    if not names:
        return ""
    listed = ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
    return f"there is: {listed}"

"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name whose spelling is closest to `word`, or None if no name is close.

    A name with two neighbouring letters swapped is the closest: `adam` for `adma`. Upper and lower case only decide
    between names that are otherwise equal. If no full name is close, only the
    parts after the last dot are compared, such as `SGD` in `torch.optim.SGD`.
    """
    ordered = sorted(set(names))
    swapped = _swaps(word.casefold())
    transposed = next((name for name in ordered if name.casefold() in swapped), None)
    if transposed is not None and word.casefold() not in {name.casefold() for name in ordered}:
        return transposed
    folded = difflib.get_close_matches(word.casefold(), {name.casefold() for name in ordered}, n=1, cutoff=0.6)
    if folded:
        return max(
            (name for name in ordered if name.casefold() == folded[0]),
            key=lambda name: difflib.SequenceMatcher(None, word, name).ratio(),
        )
    leaf = word.rpartition(".")[2].casefold()
    # Reversed, so that the first name wins if several have the same last part.
    leaves = {name.rpartition(".")[2].casefold(): name for name in reversed(ordered)}
    found = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    return leaves[found[0]] if found else None


def _swaps(word: str) -> set[str]:
    """Return the spellings of a word with two neighbouring letters swapped."""
    return {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}


def did_you_mean(word: str, names: Iterable[Any], prefix: str = "", suffix: str = "", limit: int = 24) -> str:
    """Return a hint with the nearest name, or with the first `limit` names if no name is close."""
    ordered = sorted({str(name).lower() if isinstance(name, bool) else str(name) for name in names})
    close = nearest(word, ordered)
    if close is not None:
        return f"did you mean {prefix}{close}{suffix}?"
    if not ordered:
        return ""
    shown = ", ".join(ordered[:limit]) + (", …" if len(ordered) > limit else "")
    return f"choose from: {shown}"

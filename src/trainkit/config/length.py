"""Find contradictions between the keys that decide the length of a run: `epochs`, `steps` and `max_minutes`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.hints import is_off
from trainkit.config.search_path import CONF
from trainkit.core.errors import Problem
from trainkit.core.leaves import leaves


def find_wrong_length(plain: Mapping[str, Any], raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield two lengths of a run, no length, or a reference to a length that is off.

    Args:
        plain: the config with resolved interpolations.
        raw: the config with its interpolations as they are written.
    """
    epochs, steps, minutes = (plain.get(key) for key in ("epochs", "steps", "max_minutes"))
    if not is_off(steps) and not is_off(epochs) and epochs != _default_epochs():
        yield two_lengths(steps, epochs)
    if is_off(steps) and is_off(epochs) and is_off(minutes):
        yield Problem("epochs=off: nothing ends the training", "write epochs=N, steps=N or max_minutes=N")
    has_epochs = is_off(steps) and not is_off(epochs)
    for path, leaf in leaves(raw):
        value = str(leaf)  # a list too
        if "${total_steps:" in value and is_off(steps) and is_off(epochs):
            cause = f"{path}: ${{total_steps:}} needs a planned length, and only max_minutes ends the run"
            yield Problem(cause, "write steps=N or epochs=N besides max_minutes")
        if "${epochs}" in value and not has_epochs:
            yield Problem(f"{path}: it refers to epochs, which is off", "write ${total_steps:} instead of ${epochs}")
        if "${steps_per_epoch}" in value and is_off(plain.get("steps_per_epoch")):
            cause = f"{path}: it refers to the key steps_per_epoch, which is off"
            yield Problem(cause, "write it with a colon: ${steps_per_epoch:}")


def find_two_lengths(overrides: Iterable[str], plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problem if a command line gives `epochs`, even its default, to a run with `steps`.

    Args:
        overrides: `KEY=VALUE`.
        plain: the config with the overrides.
    """
    try:
        steps, epochs = plain.get("steps"), plain.get("epochs")
    except OmegaConfBaseException:  # an interpolation that cannot be resolved is reported with the values
        return
    gives_epochs = any(text.lstrip("+").startswith("epochs=") for text in overrides)
    if gives_epochs and not is_off(epochs) and not is_off(steps):
        yield two_lengths(steps, epochs)


def two_lengths(steps: Any, epochs: Any) -> Problem:
    """Return the problem of a run with two lengths."""
    return Problem(f"steps={steps} and epochs={epochs}: a run has one of them", "write epochs=off, or steps=off")


def _default_epochs() -> Any:
    return OmegaConf.load(CONF / "config.yaml").epochs

"""What has changed between a checkpoint and the config that resumes it, and what of it is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainkit.config.renamed import upgrade_fingerprint
from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError, Problem
from trainkit.data.contents import differing_facts
from trainkit.display.text import count
from trainkit.runs.fingerprint import differences, fingerprint, is_allowed


@dataclass(frozen=True)
class Changes:
    """The differences that a resume accepts.

    Args:
        keys: the top-level config keys that differ.
        notes: a line about each difference.
    """

    keys: set[str]
    notes: list[str]


def find_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any], settings: Settings, allow: Sequence[str]
) -> Changes:
    """Compare the fingerprint of a checkpoint with that of the session that resumes it.

    A longer `epochs` or `steps` is always allowed, with its consequences for schedulers.

    Args:
        saved: the fingerprint in the checkpoint.
        current: the fingerprint of the session.
        settings: the settings of the session.
        allow: keys that may differ.

    Raises:
        CheckpointError: differences that change the mathematics and are not allowed, each with both values.
    """
    sections = ("config", "data", "machine")
    length = {key: saved.get(key) for key in ("epochs", "steps")}  # older checkpoints have no steps
    if not all(isinstance(saved.get(key), dict) for key in sections) or any(
        type(value) not in (int, type(None)) for value in length.values()
    ):
        raise CheckpointError("the checkpoint does not contain its config", hint="start a new run")
    same_length = fingerprint(settings, length=length)
    found = differences(upgrade_fingerprint(saved["config"]), same_length)
    by_length = differences(same_length, current["config"])
    found |= {key: values for key, values in by_length.items() if not key.startswith("scheduler.")}
    found |= {f"data ({key})": values for key, values in differing_facts(saved["data"], current["data"]).items()}
    if "lr" in found:  # keys that only follow the root's lr are not listed
        found = {k: v for k, v in found.items() if k == "lr" or not (k.endswith(".lr") and v == found["lr"])}
    _refuse({key: values for key, values in found.items() if not is_allowed(_key_of(key), allow)}, allow)
    notes = [f"note: {key} was {old!r}, and is {new!r} from here on" for key, (old, new) in found.items()]
    if by_length:
        covered = next((count(current[key], key[:-1]) for key in ("steps", "epochs") if current[key]), "another length")
        notes.append(f"note: the scheduler now covers {covered}, and is fast-forwarded")
    machine = differences({"ranks": 1} | saved["machine"], current["machine"])  # older checkpoints have no ranks
    notes += [f"note: {key} was {old}, and is {new}: equal only up to rounding" for key, (old, new) in machine.items()]
    return Changes({_section_of(key) for key in [*found, *by_length]}, notes)


def _refuse(refused: Mapping[str, tuple[Any, Any]], allow: Sequence[str]) -> None:
    """Raise `CheckpointError` if there are refused changes. Its hint lists what `resume.allow` would accept."""
    if not refused:
        return
    sections = ",".join(dict.fromkeys([*allow, *(_section_of(key) for key in refused)]))
    problems = [Problem(f"{key}: {old!r} in the checkpoint, {new!r} now") for key, (old, new) in refused.items()]
    hint = f"keep the old value, or start a new run, or accept the change from here on with 'resume.allow=[{sections}]'"
    raise CheckpointError(*problems[:-1], Problem(problems[-1].cause, hint))  # one hint, after the last problem


def _key_of(key: str) -> str:
    """Return the config key of a difference, such as data.val for `data (validation samples)`."""
    name, _, fact = key.partition(" (")
    part = {"training": ".train", "validation": ".val"}.get(fact.partition(" ")[0], "")
    return f"{name}{part}"


def _section_of(key: str) -> str:
    return _key_of(key).partition(".")[0]

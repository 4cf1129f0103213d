"""Explain where a value of a config comes from, as plain containers without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.check import references
from trainkit.config.defaults import differences
from trainkit.config.origin import ABSENT, Event
from trainkit.config.trace import Trace
from trainkit.core.errors import ConfigError
from trainkit.core.leaves import leaves
from trainkit.core.paths import display_path
from trainkit.core.redaction import (
    ENVIRONMENT,
    REDACTED,
    environment_secrets,
    find_secrets,
    is_secret,
    redact_by_key,
    redact_command_line,
    replace_secrets,
)
from trainkit.core.spelling import did_you_mean

# In the text of a value: the name of a resolver, and the key that a resolver of OmegaConf reads.
RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
SELECT = re.compile(r"\$\{\s*oc\.(?:select|dict\.keys|dict\.values|deprecated)\s*:\s*['\"]?([\w.\[\]]+)")
MEANINGS = {  # of the resolvers of trainkit
    "total_steps": "the number of steps of the scheduler, known once the data is read",
    "steps_per_epoch": "the number of steps of an epoch, known once the data is read",
    "without_folds": "the value, or null if data.folds is on",
}
DEPENDS = {"without_folds": ("data.folds",)}  # the keys that a resolver reads
SWEEP = "hydra.sweeper.params"
MAX_DEPTH = 20  # of references to references


def explain(trace: Trace, key: str) -> dict[str, Any]:
    """Return the value of a key, and where it comes from.

    Args:
        trace: the config.
        key: the dotted key of a value or of a mapping, or the name of a group.

    Raises:
        ConfigError: the config never had such a key.
    """
    leaf = _leaf_of(trace, key)
    inside = [name for name in trace.histories if name.startswith(f"{key}.")]
    if leaf is None and not inside and key not in trace.choices:
        raise ConfigError(f"{key}: the config has no such key", hint=did_you_mean(key, _names(trace)))
    found: dict[str, Any] = {"key": key}
    if key in trace.choices:
        found["choice"] = trace.choices[key][-1].value
        found["chosen"] = [_event(event, "") for event in trace.choices[key]]
    if inside and (leaf is None or trace.histories[leaf][-1].value is ABSENT):
        found["keys"] = [_explain_leaf(trace, name) for name in inside]
    elif leaf is not None:
        found |= _explain_leaf(trace, leaf, key)
    return _without_secrets(found, trace)


def explain_differences(trace: Trace, config_dir: str | None = None) -> dict[str, Any]:
    """Return what differs from the defaults: each group and key with its default, its value and its origin."""
    plain: Any = OmegaConf.to_container(trace.config, resolve=False)
    choices = {str(group): str(name) for group, name in trace.hydra.runtime.choices.items()}
    base, rows = differences(dict(leaves(plain)), choices, config_dir)
    found = []
    for key, default, value in rows:
        is_choice = key in trace.choices and choices.get(key) == value
        events = trace.choices[key] if is_choice else trace.histories.get(key, [])
        row = {"key": key, "default": _shown(key, default), "value": _shown(key, value)}
        found.append(row | {"origin": _origin(events[-1]) if events else None})
    return _without_secrets({"compared_with": base, "differences": found}, trace)


def _leaf_of(trace: Trace, key: str) -> str | None:
    """Return the leaf that a key names. The item of a list, `watch[0]`, belongs to the list."""
    name = _dotted(key)
    while name:
        if name in trace.histories and (name == key or isinstance(trace.histories[name][-1].value, list)):
            return name
        name = name.rpartition(".")[0]
    return None


def _dotted(key: str) -> str:
    """Return a key with dots for brackets: `watch.0` for `watch[0]`."""
    return re.sub(r"\[(\w+)\]", r".\1", key)


def _names(trace: Trace) -> set[str]:
    """Return the keys and groups that a user may ask for, to suggest one of them."""
    names = {name for name in trace.histories if not name.startswith("hydra.")} | trace.choices.keys()
    for name in list(names):
        parts = name.split(".")
        names |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return {name for name in names if "/" not in name}


def _explain_leaf(trace: Trace, leaf: str, key: str | None = None) -> dict[str, Any]:
    return _explain(trace, leaf, key or leaf, frozenset(), is_hidden=False)


def _explain(trace: Trace, leaf: str, key: str, above: frozenset[str], *, is_hidden: bool) -> dict[str, Any]:
    """Return the value, the events and the references of a leaf.

    Args:
        trace: the config.
        leaf: its dotted key.
        key: the key as the user wrote it: the leaf or an item of it.
        above: the leaves that refer to this leaf.
        is_hidden: whether a secret refers to it.
    """
    events = trace.histories[leaf]
    written = events[-1].value
    is_hidden = is_hidden or any(is_secret(part) for part in leaf.split("."))
    value = _shown(leaf, _resolved(trace, key, written), is_hidden=is_hidden)
    found: dict[str, Any] = {"key": key, "value": value}
    if isinstance(written, str) and "${" in written:
        found["written"] = _shown(leaf, written, is_hidden=is_hidden)
    found["history"] = [_event(event, leaf, is_hidden=is_hidden) for event in events]
    if "${" in str(written) and len(above) < MAX_DEPTH:
        sources = _sources(trace, leaf, written, above | {leaf}, is_hidden=is_hidden)
        found["sources"] = list(sources)
    sweep = trace.histories.get(f"{SWEEP}.{leaf}")
    if sweep is not None and sweep[-1].value is not ABSENT:
        found["sweep"] = _event(sweep[-1], leaf)
    return found


def _sources(
    trace: Trace, leaf: str, written: Any, above: frozenset[str], *, is_hidden: bool
) -> Iterator[dict[str, Any]]:
    """Yield what the interpolations of a leaf refer to: other keys, environment variables and resolvers."""
    text = str(written)
    resolvers = dict.fromkeys(RESOLVER.findall(text))
    names = [*references(text, tuple(leaf.split("."))), *SELECT.findall(text)]
    names += [name for resolver in resolvers for name in DEPENDS.get(resolver, ())]
    for name in dict.fromkeys(map(_dotted, names)):
        target = _leaf_of(trace, name)
        inside = [key for key in trace.histories if key.startswith(f"{name}.") and key not in above]
        if target in above:
            yield {"key": name, "note": "refers back to itself"}
        elif target is not None and trace.histories[target][-1].value is not ABSENT:
            yield _explain(trace, target, name, above, is_hidden=is_hidden)
        elif inside:
            yield {"key": name, "keys": [_explain(trace, key, key, above, is_hidden=is_hidden) for key in inside]}
        else:
            yield {"key": name, "note": "the config has no such key"}
    for variable in dict.fromkeys(ENVIRONMENT.findall(text)):
        value = os.environ.get(variable)
        hidden = REDACTED if value and (is_hidden or is_secret(variable)) else value
        yield {"variable": variable, "value": hidden, "note": "set" if value is not None else "not set"}
    for resolver in resolvers:
        if resolver != "oc.env":
            yield {"resolver": resolver, "note": MEANINGS.get(resolver, f"a resolver of {_owner(resolver)}")}


def _owner(resolver: str) -> str:
    if resolver.startswith("oc."):
        return "OmegaConf"
    return "Hydra" if resolver in ("now", "hydra") else "custom code"


def _resolved(trace: Trace, key: str, written: Any) -> Any:
    """Return the resolved value of a key; as it is written if it cannot be resolved."""
    if written is ABSENT:
        return ABSENT
    config: DictConfig = OmegaConf.create({"hydra": trace.hydra}) if key.startswith("hydra.") else trace.config
    try:
        value = OmegaConf.select(config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, ValueError, TypeError):
        return written


def _event(event: Event, key: str, *, is_hidden: bool = False) -> dict[str, Any]:
    return {"value": _shown(key, event.value, is_hidden=is_hidden), "origin": _origin(event)}


def _origin(event: Event) -> dict[str, Any]:
    origin = event.origin
    text = str(origin)
    if origin.file is None:  # an override, or a reason that quotes one
        [text] = redact_command_line([text], ())
    file = None if origin.file is None else display_path(origin.file)
    return {"by": origin.by, "text": text, "file": file, "line": origin.line}


def _shown(key: str, value: Any, *, is_hidden: bool = False) -> Any:
    """Return a value without the secrets that its key marks."""
    if is_hidden and isinstance(value, str | int | float) and not isinstance(value, bool):
        key = "password"  # a key that is redacted
    parts = key.split(".") if key else ["value"]
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    nested = redact_command_line(redact_by_key(nested), ())
    for part in parts:
        nested = nested[part]
    return nested


def _without_secrets(found: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """Replace the secrets of the config and of the environment, wherever they appear."""
    secrets = set(environment_secrets())
    for resolve in (False, True):
        try:
            secrets |= set(find_secrets(OmegaConf.to_container(trace.config, resolve=resolve)))
        except OmegaConfBaseException:  # an interpolation that cannot be resolved
            continue
    cleaned: dict[str, Any] = _replace(found, secrets)
    return cleaned


def _replace(node: Any, secrets: set[str]) -> Any:
    if isinstance(node, dict):
        return {key: _replace(item, secrets) for key, item in node.items()}
    if isinstance(node, list):
        return [_replace(item, secrets) for item in node]
    return replace_secrets(node, secrets) if isinstance(node, str) else node

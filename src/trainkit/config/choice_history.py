"""Who chose what in each group: the defaults lists of the configs, and the command line."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser

from trainkit.config.config_files import ConfigFiles
from trainkit.config.origin import ABSENT, Event, Origin

ROOT = ("<root>", "config", "hydra/config")  # the configs whose own defaults lists hold the default choices


class ChoiceHistory:
    """The choices of the groups.

    Args:
        files: finds the files of configs.
        defaults: the configs that Hydra has merged.
        chosen: the `Overrides` of Hydra's defaults list, which decide between several choices.
        overrides: of the command line.

    Attributes:
        events: for each group, who chose what; the last event counts.
    """

    def __init__(
        self, files: ConfigFiles, defaults: Sequence[ResultDefault], chosen: Any, overrides: Sequence[str]
    ) -> None:
        self.files = files
        self.events: dict[str, list[Event]] = {}
        typed = _typed_choices(overrides)
        names = list(dict.fromkeys(str(default.config_path) for default in defaults))
        entries = [(name, entry) for name in ("config", *names) for entry in self._entries(name)]
        # Hydra's `known_choices` lack the groups for which a list is chosen.
        for group in {*chosen.known_choices, *chosen.override_choices, *chosen.deletions}:
            choices = [event for _, (key, is_override, event) in entries if key == group and not is_override]
            changes = [(name, event) for name, (key, is_override, event) in entries if key == group and is_override]
            metadata = chosen.override_metadata.get(group)
            winner = metadata.containing_config_path if metadata is not None else None
            changes.sort(key=lambda pair: pair[0] == winner)  # the config that Hydra follows comes last
            given = [event for key, event in typed if key == group]
            events = [*choices, *(event for _, event in changes), *given]
            if events:
                self.events[group] = [event for i, event in enumerate(events) if event not in events[:i]]

    def via(self, default: ResultDefault) -> str:
        """Return who chose or included a config; empty for a default choice."""
        parent, path = str(default.parent), str(default.config_path)
        if default.override_key is None and not default.is_self and parent not in ROOT:
            place = self.files.find(parent)
            for entry in place.lines.defaults if place.lines is not None else []:
                if not entry.name and _absolute(parent, entry.choice) == path:
                    return f"included by {Origin('file', '', place.file, entry.line)}"
        group, _, name = path.rpartition("/")
        events = self.events.get(default.override_key or group, [])
        if not events or (len(events) == 1 and parent in ROOT):
            return ""
        chosen, origin = events[-1].value, events[-1].origin
        if name != chosen and name not in (chosen if isinstance(chosen, list) else ()):
            return ""
        return f"{group}={name} " + ("on the command line" if origin.by == "command line" else f"by {origin}")

    def _entries(self, config_path: str) -> Iterator[tuple[str, bool, Event]]:
        """Yield group, whether it is an override, and the choice, for each entry of a config's defaults list."""
        place = self.files.find(config_path)
        for entry in place.lines.defaults if place.lines is not None else []:
            if entry.name:
                group = _absolute(config_path, entry.name)
                yield group, entry.override, Event(entry.choice, Origin("file", "", place.file, entry.line))


def _typed_choices(overrides: Sequence[str]) -> list[tuple[str, Event]]:
    """Return the group, or the key, and the value of each override of a command line; mappings choose nothing."""
    parsed = [OverridesParser.create().parse_override(text.removeprefix("++")) for text in overrides]
    return [
        (
            override.get_key_element().lstrip("+~"),
            Event(
                ABSENT if override.is_delete() else override.value(), Origin("command line", str(override.input_line))
            ),
        )
        for override in parsed
        if not isinstance(override.value(), dict)
    ]


def _absolute(config_path: str, name: str) -> str:
    """Return the path of a group or a config that a defaults list names."""
    return name[1:] if name.startswith("/") else posixpath.join(posixpath.dirname(config_path), name)

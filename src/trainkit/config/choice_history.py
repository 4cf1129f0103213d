"""Who chose what in each group: the defaults lists of the configs, and the command line."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser

from trainkit.config.config_files import ConfigFiles
from trainkit.config.origin import ABSENT, Event, Origin

ROOT = ("<root>", "config", "hydra/config")  # the parents of what is composed by default


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
        groups = {*chosen.known_choices, *chosen.deletions}
        parsed = [OverridesParser.create().parse_override(text.removeprefix("++")) for text in overrides]
        names = list(dict.fromkeys(str(default.config_path) for default in defaults))
        entries = [(name, entry) for name in ("config", *names) for entry in self._entries(name)]
        for group in groups:
            first = [event for _, (key, override, event) in entries if key == group and not override]
            later = [(name, event) for name, (key, override, event) in entries if key == group and override]
            metadata = chosen.override_metadata.get(group)
            winner = metadata.containing_config_path if metadata is not None else None
            later.sort(key=lambda pair: pair[0] == winner)
            typed = [
                Event(ABSENT if o.is_delete() else o.value(), Origin("command line", str(o.input_line)))
                for o in parsed
                if o.get_key_element().lstrip("+~") == group and not isinstance(o.value(), dict)
            ]
            events = list(dict.fromkeys([*first, *(event for _, event in later), *typed]))
            if events:
                self.events[group] = events

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


def _absolute(config_path: str, name: str) -> str:
    """Return the path of a group or a config that a defaults list names."""
    return name[1:] if name.startswith("/") else posixpath.join(posixpath.dirname(config_path), name)

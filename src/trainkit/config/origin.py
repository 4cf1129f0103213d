"""Where a value of a config comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.config.search_path import CONF
from trainkit.core.paths import display_path


class Absent:
    """The value of a key that does not exist."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


@dataclass(frozen=True)
class Origin:
    """What set a value.

    Attributes:
        by: `file`, `command line`, `dotted path`, `trainkit`, or `Hydra`.
        text: the override, the reason, or the name of a config without a file.
        file: the config file, if a file set the value.
        line: in the file, from 1.
        via: who chose or included the file, unless it is a default choice.
    """

    by: str
    text: str = ""
    file: Path | None = None
    line: int | None = None
    via: str = ""

    def __str__(self) -> str:
        if self.file is None:
            place = f"{self.by}: {self.text}"
        else:
            shipped = self.file.is_relative_to(CONF)
            name = f"shipped {self.file.relative_to(CONF).as_posix()}" if shipped else display_path(self.file)
            place = name if self.line is None else f"{name}:{self.line}"
        return f"{place} ({self.via})" if self.via else place


@dataclass(frozen=True)
class Event:
    """A value that was set (`ABSENT`: removed), and what set it."""

    value: Any
    origin: Origin

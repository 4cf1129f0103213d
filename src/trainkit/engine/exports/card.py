"""The model card of an export: what the model is, and how others load it, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.core.terminal import printable
from trainkit.display.tables import markdown_lines
from trainkit.display.text import number

MAX_CLASSES = 200  # names in a card; the metadata of the file has all
MAX_SETTINGS = 60


@dataclass(frozen=True)
class TensorRow:
    """The name, the shape and the dtype of an input or an output, such as (N, 10) and float32. N is the batch size."""

    name: str
    shape: str
    dtype: str

    @property
    def cells(self) -> list[str]:
        """The cells of a row in Markdown."""
        return [f"`{self.name}`", self.shape, self.dtype]


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        title: the name of the model.
        facts: the first table: what was exported, and from which run.
        code: how the file is loaded, in Python.
        code_note: what the code needs.
        inputs: the inputs of the file; empty if they are not known.
        outputs: the outputs of the file.
        preprocessing: steps from a raw input to the inputs, in words.
        classes: the names of the classes, in the order of the outputs; None if they are not known.
        metrics: the metrics of the epoch.
        metrics_note: which epoch it is.
        settings: what the config of the run differs in.
        notes: what else a user should know.
    """

    title: str
    facts: Mapping[str, str]
    code: Sequence[str]
    code_note: str = ""
    inputs: Sequence[TensorRow] = ()
    outputs: Sequence[TensorRow] = ()
    preprocessing: Sequence[str] = ()
    classes: Sequence[str] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    metrics_note: str = ""
    settings: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return the card as Markdown."""
        lines = [f"# {_plain(self.title)}", "", *_table(["", ""], [[key, value] for key, value in self.facts.items()])]
        lines += ["## Load", "", *([self.code_note, ""] if self.code_note else []), "```python", *self.code, "```", ""]
        if self.inputs:
            lines += ["## Inputs and outputs", "", "N is the batch size, which may be any.", ""]
            lines += _table(["input", "shape", "dtype"], [row.cells for row in self.inputs])
            lines += _table(["output", "shape", "dtype"], [row.cells for row in self.outputs])
        if self.preprocessing:
            lines += ["## Preprocessing", "", *(f"- {step}" for step in self.preprocessing), ""]
        if self.classes is not None:
            lines += ["## Classes", "", *_classes(self.classes), ""]
        if self.metrics:
            rows = [[f"`{_plain(name)}`", number(value)] for name, value in self.metrics.items()]
            lines += ["## Metrics", "", self.metrics_note, "", *_table(["metric", "value"], rows)]
        if self.settings:
            rows = [[f"`{_plain(key)}`", f"`{_plain(value)}`"] for key, value in self.settings[:MAX_SETTINGS]]
            lines += ["## Settings", "", "What the training changed in the default config:", ""]
            lines += _table(["key", "value"], rows)
        if self.notes:
            lines += ["## Notes", "", *(f"- {note}" for note in self.notes), ""]
        return "\n".join(lines)


def _classes(names: Sequence[str]) -> list[str]:
    """Return the lines about the classes. As JSON, no name can break the page."""
    shown = json.dumps(list(map(str, names[:MAX_CLASSES])), ensure_ascii=False).replace("`", "\\u0060")
    more = f" The first {MAX_CLASSES} are shown; the metadata has all." if len(names) > MAX_CLASSES else ""
    return [f"{len(names):,} classes, in the order of the outputs.{more}", "", "```json", printable(shown), "```"]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*markdown_lines(titles, rows), ""]


def _plain(text: str) -> str:
    """Return a text that cannot end a cell of a table or a span of code."""
    return printable(text).replace("\n", " ").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")

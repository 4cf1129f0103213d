"""The report of a run as an HTML page, from plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from trainkit.display.charts import Chart, metric_names, run_charts
from trainkit.display.page import (
    Cell,
    Content,
    Html,
    details,
    element,
    listing,
    page,
    section,
    table,
    text,
    tiles,
    verbatim,
)
from trainkit.display.report_parts import MAX_ROWS, chart_section, first_rows, footer, metric_cell, missing_lines
from trainkit.display.text import SHOWN_METRICS, count, duration, number, option_value, shown_options

MAX_VALUES = 50  # of a list or in a row of a matrix


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run say.

    Attributes:
        name: the name of the run: its directory.
        info: the content of `run.json`.
        history: the metrics of each epoch.
        params: the rows of `params.json`.
        overrides: the overrides of the command line.
        config: the text of the config.
        base: what the config is compared with.
        differences: key, default and value of each key that differs.
        log: the lines of the log.
        missing: what is missing or damaged.
    """

    name: str
    info: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    params: Sequence[Mapping[str, Any]] = ()
    overrides: Sequence[str] = ()
    config: str = ""
    base: str = ""
    differences: Sequence[tuple[str, str, str]] = ()
    log: Sequence[str] = ()
    missing: Sequence[str] = ()

    @property
    def charts(self) -> list[Chart]:
        """The charts of the run."""
        return run_charts(self.history, self.info.get("best"))


def run_page(facts: RunFacts) -> str:
    """Return the report of a run."""
    info = facts.info
    status = str(info.get("status", "unknown"))
    parts = [
        element("h1", facts.name),
        _status(status, str(info.get("why") or "")),
        element("p", element("code", " ".join(facts.overrides) or "no overrides"), class_="soft"),
        missing_lines(facts.missing),
        tiles(_run_numbers(facts)),
        section("Learning curves", chart_section(facts.charts), details("Numbers", _epochs(facts.history))),
        section("Metrics with several values", *_lists(facts)),
        section("Param groups", _groups(facts.params), details("Parameters", _parameters(facts.params))),
        section(
            "Config",
            table(f"What differs from {facts.base}", ["key", "default", "this run"], facts.differences)
            if facts.base and facts.differences
            else element("p", f"Nothing differs from {facts.base}." if facts.base else ""),
            details("The whole config", verbatim(facts.config, "config")),
        ),
        section("Warnings and notes", _notes(facts.log), details("The log", verbatim("\n".join(facts.log), "log"))),
        section("Environment", table("Where and how it ran", ["fact", "value"], _environment(info))),
        footer(),
    ]
    return page(f"{facts.name} · trainkit", parts)


def _run_numbers(facts: RunFacts) -> dict[str, tuple[str, str]]:
    """Return the headline numbers of a run."""
    info, history, best = facts.info, facts.history, facts.info.get("best") or {}
    numbers: dict[str, tuple[str, str]] = {}
    if best:
        numbers[f"best {best['metric']}"] = (number(best["value"]), f"epoch {best['epoch']}")
        for name in SHOWN_METRICS:
            if name in best and name != best["metric"]:
                numbers[name] = (number(best[name]), f"epoch {best['epoch']}")
    if history:
        numbers["epochs"] = (f"{len(history):,}", f"{history[-1].get('step', '?')} steps")
        unit = "tokens" if "tokens_per_second" in history[-1] else "samples"
        rates = _finite(history, f"{unit}_per_second")
        speed = f"{sorted(rates)[len(rates) // 2]:,.0f} {unit}/s" if rates else ""
        numbers["training"] = (duration(sum(_finite(history, "seconds"))), speed)
    if "parameters" in info:
        trainable = info.get("trainable_parameters", info["parameters"])
        frozen = info["parameters"] - trainable
        numbers["parameters"] = (f"{info['parameters']:,}", f"{frozen:,} frozen" if frozen else "")
    if "train_samples" in info:
        train, held = (_samples(info.get(f"{part}_samples", 0)) for part in ("train", "val"))
        numbers["training samples"] = (train, "no validation" if held == "0" else f"{held} for validation")
    return numbers


def _samples(number: int | None) -> str:
    return "a stream" if number is None else f"{number:,}"


def _finite(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the finite values of a metric."""
    found = [row.get(name) for row in history]
    return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]


def _epochs(history: Sequence[Mapping[str, Any]]) -> Html:
    names = ["epoch", *(name for name in metric_names(history) if name != "epoch")]
    rows = [[str(row["epoch"]), *(metric_cell(row.get(name)) for name in names[1:])] for row in history[-MAX_ROWS:]]
    return table("Metrics of each epoch", names, rows, sortable=True)


def _lists(facts: RunFacts) -> list[Html]:
    """Return the metrics of the best epoch that are lists, such as a value per class, or matrices."""
    best, history = facts.info.get("best") or {}, facts.history
    row = next((row for row in history if row["epoch"] == best.get("epoch")), history[-1] if history else {})
    lists = {name: value for name, value in row.items() if isinstance(value, list) and 0 < len(value) <= MAX_VALUES}
    tables = []
    for size in dict.fromkeys(map(len, lists.values())):
        flat = {name: value for name, value in lists.items() if len(value) == size and not _has_lists(value)}
        rows = [[name, *map(metric_cell, value)] for name, value in flat.items()]
        tables.append(table(f"Epoch {row['epoch']}", ["metric", *map(str, range(size))], rows))
    for name, matrix in lists.items():
        if _has_lists(matrix) and len({len(line) for line in matrix}) == 1 and len(matrix[0]) <= MAX_VALUES:
            rows = [[str(place), *map(metric_cell, line)] for place, line in enumerate(matrix)]
            tables.append(table(f"{name} of epoch {row['epoch']}", ["row", *map(str, range(len(matrix[0])))], rows))
    return tables


def _has_lists(values: Sequence[Any]) -> bool:
    return all(isinstance(value, list) for value in values)


def _groups(params: Sequence[Mapping[str, Any]]) -> Html:
    """Return a row for each param group, with the rule that set each option."""
    names = shown_options(params)
    rows: list[list[Content]] = []
    for group in dict.fromkeys(row["group"] for row in params):
        members = [row for row in params if row["group"] == group]
        size = f"{sum(row['count'] for row in members):,}"
        cells = [_option(members[0], name) for name in names]
        rows.append([group or "(frozen)", str(len(members)), size, members[0]["optimizer"] or "", *cells])
    return table(
        "The rule that set a value is behind it", ["group", "tensors", "parameters", "optimizer", *names], rows
    )


def _parameters(params: Sequence[Mapping[str, Any]]) -> Html:
    names = shown_options(params)
    rows: list[list[Content]] = []
    for row in params[:MAX_ROWS]:
        label, shape = " = ".join([row["name"], *row["aliases"]]), "x".join(map(str, row["shape"]))
        size = Cell(f"{row['count']:,}", float(row["count"]))
        rows.append([label, shape, size, row["group"] or "(frozen)", *(_option(row, name) for name in names)])
    caption = f"Parameters, in the order of the model{first_rows(len(params))}"
    return table(caption, ["parameter", "shape", "elements", "group", *names], rows, sortable=True)


def _option(row: Mapping[str, Any], name: str) -> Content:
    if name not in row["options"]:
        return ""
    rule, value = row["decided_by"].get(name, "default"), option_value(row["options"][name])
    return value if rule == "default" else f"{value} (by {rule})"


def _notes(log: Sequence[str]) -> Html:
    """Return the notes and warnings of a log, each once."""
    found = [line.partition(" ")[2] for line in log]
    notes = [
        line for line in dict.fromkeys(found) if line.lower().startswith(("note:", "warning", "failed", "stopped"))
    ]
    return listing(notes, "lines") if notes else element("p", "None." if log else "")


def _environment(info: Mapping[str, Any]) -> list[list[Content]]:
    versions = info.get("versions")
    command = info.get("command")
    facts = {
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "started": info.get("started"),
        "ended": info.get("ended"),
        "resumed": count(len(info["resumed"]), "time") if info.get("resumed") else None,
        "device": info.get("device"),
        "host": info.get("host"),
        "folder": info.get("folder"),
        "git commit": info.get("git_commit"),
        "exit code": info.get("exit_code"),
        **(versions if isinstance(versions, Mapping) else {}),
    }
    return [[str(name), str(value)] for name, value in facts.items() if value is not None]


def _status(status: str, why: str) -> Html:
    kind = status if status in ("completed", "failed") else ""
    reason = f" {escape(why)}" if why else ""
    return Html(f'<p><span class="status {kind}">{text(status)}</span>{reason}</p>')

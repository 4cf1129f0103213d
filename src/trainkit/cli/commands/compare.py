"""Compare runs: one table over runs, sweeps and folders, the best first, with mean and deviation over seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainkit.cli.words import new_file, parse_words, whole_number
from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.core.terminal import printable_lines
from trainkit.display.tables import csv_lines, latex_table, markdown_table
from trainkit.display.text import as_json
from trainkit.sweeps.collect import collect
from trainkit.sweeps.comparison import compare
from trainkit.sweeps.search.text import search_lines
from trainkit.sweeps.table_text import as_dict, cells, exact_cells, other_lines, table_lines

FORMATS = ("json", "csv", "markdown", "latex")
SWITCHES = (*(f"--{name}" for name in FORMATS), "--reverse")
OPTIONS = ("--sort", "--group-by", "--top", "--plot", "--x")
PICTURES = (".png", ".svg")
HINT = "write trainkit compare PATH...; PATH is a run, a sweep, a folder that holds them, or the word last"


def run(argv: Sequence[str]) -> int:
    """Print the comparison of the runs that the command line names."""
    args = parse(argv)
    collection = collect([Path("outputs/latest") if name == "last" else Path(name) for name in args.paths])
    keys = None if args.group_by is None else [name.strip() for name in args.group_by.split(",") if name.strip()]
    table = compare(collection, group_by=keys, sort=args.sort, reverse=args.reverse, top=args.top)
    notes = list(table.notes)
    if args.plot is not None:
        from trainkit.sweeps.plot_data import plot

        notes += plot(collection, args.plot, group_by=keys, x=args.x, top=args.top)
    more = [line for search in table.searches for line in search_lines(search)]
    more += [*other_lines(table, collection.runs), *(f"note: {note}" for note in notes)]
    more += [f"plot: {display_path(args.plot)}"] if args.plot is not None else []
    if args.json:
        print(as_json({**as_dict(table), "notes": notes, "plot": args.plot}))
    elif args.csv:
        print(printable_lines(csv_lines(*exact_cells(table))))
        print(printable_lines(more), end="\n" * bool(more), file=sys.stderr)
    elif args.markdown:
        listed = [f"- {line}" for line in more]
        print(printable_lines([*markdown_table(*cells(table, directories=False)), *[""] * bool(more), *listed]))
    elif args.latex:
        listed = [f"% {line}" for line in more]
        print(printable_lines([*latex_table(*cells(table, directories=False)), *listed]))
    else:
        print(printable_lines([*table_lines(table), *more]))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of this command, which takes no overrides.

    Raises:
        ConfigError: a flag is unknown, or its value is not valid.
    """
    args = parse_words(_join_descending(argv), "compare", SWITCHES, OPTIONS, HINT)
    args.paths = args.words
    if not args.paths or "" in args.paths:
        raise ConfigError("compare needs a path", hint=HINT)
    given = [f"--{name}" for name in FORMATS if getattr(args, name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other", hint=f"keep {given[0]}")
    args.top = whole_number("--top", args.top)
    args.plot = _picture(args.plot)
    if args.x is not None and args.plot is None:
        raise ConfigError("--x names the axis of a plot, and there is no --plot", hint="add --plot FILE.png")
    return args


def _join_descending(argv: Sequence[str]) -> list[str]:
    """Return the words with `--sort -KEY` as one word, because argparse would read `-KEY` as a flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--sort":
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _picture(name: str | None) -> Path | None:
    """Return the path of the picture to write.

    Raises:
        ConfigError: its format is not supported, or its folder does not exist.
    """
    if name is None:
        return None
    if Path(name).suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {name}: the name must end with .png or .svg", hint="for example --plot curves.png")
    return new_file("--plot", name)

"""Predict classes or numbers for files: images, rows of a table, lines of a text; no training data is needed."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import IO, Any

from trainkit.cli import arguments
from trainkit.cli.words import new_file, parse_words, whole_number
from trainkit.config.schema import RootKeys
from trainkit.core.atomic import atomic_write
from trainkit.core.errors import ConfigError, DataError
from trainkit.core.imports import fast_imports
from trainkit.core.paths import check_exist, storage_error
from trainkit.core.terminal import printable
from trainkit.display.rows import FORMATS, RowText, place_text
from trainkit.display.text import count
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run

SWITCHES = ("--json", "--probabilities", "--flip")
OPTIONS = ("--checkpoint", "--batch-size", "--output", "--format", "--top")
HINT = "write trainkit predict RUN FILE...; RUN is the directory of a run, or the word last"


def run(argv: Sequence[str]) -> int:
    """Print the predictions for the files that the command line names, one row for each sample."""
    args = parse(argv)
    check_exist(name for name in args.files if name != "-")
    arguments.print_last([args.run])
    saved = Run.load(find_run(args.run))
    unreadable: list[str] = []

    def on_unreadable(place: Mapping[str, Any], reason: str) -> None:
        name = place_text(place)
        unreadable.append(name)
        arguments.print_note(f"cannot be read: {name}: {reason}")

    with redirect_stdout(sys.stderr):  # what custom code prints is not a row
        with fast_imports():
            from trainkit.engine.predict import predict

        rows = predict(
            saved,
            args.files,
            checkpoint=args.checkpoint,
            overrides=args.overrides,
            batch_size=args.batch_size,
            top=args.top,
            probabilities=args.probabilities,
            flip=args.flip,
            on_unreadable=on_unreadable,
            on_note=arguments.print_note,
        )
        done = _write(rows, RowText(args.format), args.output)
    if unreadable:
        cause = f"{count(len(unreadable), 'input')} could not be read; the other {done:,} are predicted"
        raise DataError(cause, hint="the lines above give the reasons")
    return 0


def _write(rows: Iterator[dict[str, Any]], text: RowText, output: Path | None) -> int:
    """Write the rows, and return their number. A file is written completely or not at all, and not without a row."""
    counter = itertools.count()
    first = next(rows, None)
    if first is None:
        return 0
    rows = itertools.chain([first], rows)

    def write(file: IO[bytes]) -> None:
        for row in rows:
            file.write(text.encode(row))
            next(counter)

    if output is not None:
        try:
            atomic_write(output, write)
        except OSError as error:
            raise storage_error(output, error) from error
    else:
        stdout = sys.__stdout__  # sys.stdout is redirected, as custom code may print
        assert stdout is not None
        for row in rows:
            line = text.encode(row)
            if stdout.isatty():
                stdout.write(printable(line.decode(errors="replace").removesuffix("\n")) + "\n")
            else:
                stdout.buffer.write(line)
            next(counter)
        stdout.flush()
    return next(counter)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of this command.

    A word is an override if it begins with a key of the config and an equals sign, and there is no such file.

    Raises:
        ConfigError: a flag is unknown, or its value is not valid.
    """
    args = parse_words(argv, "predict", SWITCHES, OPTIONS, HINT)
    args.overrides = [word for word in args.words if _is_override(word)]
    words = [word for word in args.words if word not in args.overrides]
    if len(words) < 2 or "" in words:
        raise ConfigError("predict needs a run and files", hint=HINT)
    args.run, *args.files = words
    if args.files.count("-") > 1:
        raise ConfigError("-: the standard input can be read once", hint="write - once")
    args.checkpoint = args.checkpoint or "best"
    args.batch_size = whole_number("--batch-size", args.batch_size)
    args.top = whole_number("--top", args.top) or 1
    args.output = None if args.output is None else new_file("--output", args.output)
    args.format = _format(args)
    return args


def _is_override(word: str) -> bool:
    key, equals, _ = word.lstrip("+~").partition("=")
    return bool(equals) and key.partition(".")[0] in RootKeys.__annotations__ and not Path(word).exists()


def _format(args: argparse.Namespace) -> str:
    """Return the format of the rows: that of a flag, else of the name of the output file, else CSV."""
    given = [args.format] if args.format is not None else []
    given += ["jsonl"] if args.json else []
    if len(set(given)) > 1:
        raise ConfigError(f"--format {args.format} and --json exclude each other", hint="remove one of them")
    suffix = "" if args.output is None else args.output.suffix.lower().removeprefix(".")
    chosen: str = given[0] if given else {"json": "jsonl", "ndjson": "jsonl"}.get(suffix, suffix or "csv")
    if chosen not in FORMATS:
        cause = f"--format {chosen}" if given else f"--output {args.output}"
        raise ConfigError(f"{cause}: there is no such format", hint="write --format csv or --format jsonl")
    return chosen

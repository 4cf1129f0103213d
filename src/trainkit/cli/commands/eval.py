"""Evaluate runs: their best weights on their validation data or on other data, with a table of the classes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError, StorageError, TrainkitError
from trainkit.core.imports import fast_imports
from trainkit.core.paths import display_path
from trainkit.core.terminal import printable, printable_lines
from trainkit.display.text import as_json
from trainkit.engine.evaluation_files import evaluation_lines, metrics_line, write_evaluation
from trainkit.runs.evaluation_config import check_overrides, read_evaluation_config
from trainkit.runs.find import checkpoint_step
from trainkit.runs.recovery import recover_run
from trainkit.sweeps.evaluations import evaluation_table, find_runs, is_one_run
from trainkit.sweeps.lifecycle import SOME_FAILED
from trainkit.sweeps.table_text import as_dict, table_lines

HINT = "write trainkit eval RUN... [KEY=VALUE ...]; RUN is a run, a sweep, or the word last"
CHECKPOINT = "checkpoint="


def run(argv: Sequence[str]) -> int:
    """Evaluate the runs that the command line names. Their configs are checked before torch is imported."""
    args = arguments.parse(argv, takes_directory=True, json=False, checkpoint="")
    if arguments.has_hydra_flag(args) or args.config_dir:
        raise ConfigError("eval takes runs and overrides, and no flag of Hydra", hint=HINT)
    names = [word for word in args.overrides if "=" not in word or Path(word).is_dir()]
    overrides = [word for word in args.overrides if word not in names and not word.startswith(CHECKPOINT)]
    if not names:
        raise ConfigError("eval needs a run", hint=HINT)
    checkpoint = _checkpoint(args)
    check_overrides(overrides)
    arguments.print_last(names)
    directories, notes = find_runs(names)
    arguments.print_notes(notes)
    if is_one_run(names):
        return _evaluate_one(directories[0], checkpoint, overrides, args)
    return _evaluate_all(directories, checkpoint, overrides, args)


def _checkpoint(args: argparse.Namespace) -> str:
    """Return the checkpoint that the flag or `checkpoint=NAME` names.

    Raises:
        ConfigError: both name one, or it is none of best, last and step-N.
    """
    given = [word.removeprefix(CHECKPOINT) for word in args.overrides if word.startswith(CHECKPOINT)]
    given += [args.checkpoint] if args.checkpoint else []
    if len(set(given)) > 1:
        raise ConfigError(f"checkpoint={given[0]} and {given[1]}: only one can be evaluated", hint="remove one of them")
    checkpoint: str = given[0] if given else "best"
    checkpoint_step(checkpoint)
    return checkpoint


def _evaluate(directory: Path, checkpoint: str, overrides: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a run; return the result of `engine.evaluate`."""
    found = recover_run(directory)
    config = read_evaluation_config(found, overrides)
    with fast_imports():
        from trainkit.engine.evaluate import evaluate_run

    with arguments.only_answer_on_stdout(args):
        return evaluate_run(found, checkpoint, config)


def _evaluate_one(directory: Path, checkpoint: str, overrides: Sequence[str], args: argparse.Namespace) -> int:
    """Evaluate a run, print the numbers and write them; return the exit code."""
    result = _evaluate(directory, checkpoint, overrides, args)
    arguments.print_notes(result["notes"])
    files, error = _write(result)
    if args.json:
        print(as_json({**result, "files": files}))
    else:
        print(printable_lines([*evaluation_lines(result), *(f"{name}: {path}" for name, path in files.items())]))
    if error is not None:
        raise error
    return 0


def _evaluate_all(directories: Sequence[Path], checkpoint: str, overrides: Sequence[str], args: Any) -> int:
    """Evaluate several runs, print their table, and report those that fail; return the exit code.

    It is 10 if some runs fail, and that of the first failure if all do.
    """
    results: list[dict[str, Any]] = []
    failures: list[tuple[Path, TrainkitError]] = []
    for directory in directories:
        try:
            result = _evaluate(directory, checkpoint, overrides, args)
        except TrainkitError as error:
            failures.append((directory, error))
            print(printable(f"{display_path(directory)}: failed"), error, sep="\n", file=sys.stderr, flush=True)
            continue
        arguments.print_note(metrics_line(result))
        name = display_path(directory)
        arguments.print_notes([f"{name}: {note}" for note in result["notes"] if note.startswith("note:")])
        files, storage_error = _write(result)
        failures += [(directory, storage_error)] if storage_error is not None else []
        results.append({**result, "files": files})
    table = evaluation_table(results)
    if args.json:
        failed = [{"run": str(run), "exit_code": error.exit_code, "why": str(error)} for run, error in failures]
        print(as_json({"table": as_dict(table), "runs": results, "failed": failed}))
    elif results:
        print(printable_lines(table_lines(table)))
    if failures and not args.json:
        print(printable_lines(f"failed: {display_path(run)}: {error.problems[0].cause}" for run, error in failures))
    if failures and not results:
        return failures[0][1].exit_code
    return SOME_FAILED if failures else 0


def _write(result: dict[str, Any]) -> tuple[dict[str, str], StorageError | None]:
    """Write the files of a result; return their paths, and the error that prevented it."""
    try:
        files, notes = write_evaluation(result)
    except StorageError as error:
        return {}, error
    arguments.print_notes(notes)
    return files, None

"""The text of `trainkit --help`, made from the commands and the config files."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from trainkit.config.comments import key_comments
from trainkit.config.search_path import CONF, user_folders

LINE_WIDTH = 112  # of the help


def help_text() -> str:
    """Return usage, commands, choices, keys, flags and examples."""
    return "\n".join(
        [
            "usage: trainkit [COMMAND] [KEY=VALUE ...]      no command means train",
            *_format_section("commands", _commands()),
            *_format_section("choices (GROUP=NAME; add a choice as a file ./conf/GROUP/NAME.yaml)", _groups()),
            *_format_section("keys (and every key of a chosen config, such as optim.momentum=0.9)", _keys()),
            *_format_section("flags of commands", COMMAND_FLAGS),
            *_format_section("flags of trainkit and of Hydra", FLAGS),
            *_format_section("examples", EXAMPLES),
        ]
    )


def command_help(name: str) -> str:
    """Return what a command does, its usage and its flags."""
    usage = USAGES.get(name, "[KEY=VALUE ...]")
    flags = {flag: text.partition(": ")[2] for flag, text in flags_of(name).items()}
    lines = [f"usage: trainkit {name} {usage}", "", *textwrap.wrap(_commands()[name], LINE_WIDTH)]
    lines += _format_section("flags", flags) if flags else []
    return "\n".join([*lines, "", "trainkit --help lists all commands, keys and choices."])


def flags_of(command: str) -> dict[str, str]:
    """Return the rows of `COMMAND_FLAGS` whose text begins with the command: `COMMAND, COMMAND: what it does`."""
    return {flag: text for flag, text in COMMAND_FLAGS.items() if command in text.partition(":")[0].split(", ")}


USAGES = {
    "compare": "PATH... [FLAGS]      PATH is a run, a sweep, a folder that holds them, or the word last",
    "eval": "RUN... [KEY=VALUE ...] [FLAGS]      RUN is a run, a sweep, a folder that holds them, or the word last",
    "export": "RUN --format FORMAT [FLAGS] [KEY=VALUE ...]      RUN is the directory of a run, or the word last",
    "init": "DIR      DIR is a new or empty directory, or . for the working directory",
    "list": "[GROUP] [--json]",
    "predict": "RUN FILE... [FLAGS]      RUN is the directory of a run, or the word last; FILE may be a folder",
    "report": "PATH [--json]      PATH is a run, a sweep, or the word last",
    "why": "KEY [KEY=VALUE ...]      KEY is a key such as optim.lr, or a group such as optim",
    "resume": "RUN [KEY=VALUE ...]      RUN is the directory of a run or a sweep, or the word last",
}
FLAGS = {
    "-m, --multirun": "train every combination of values: -m optim=sgd,adam seed=0,1,2",
    "-c, --cfg job": "show the composed config without training (--resolve: resolve interpolations)",
    "-cd, --config-dir DIR": "add DIR to the folders with configs",
    "-i, --info [WHAT]": "show how the config was composed: defaults, searchpath, …",
    "-sc, --shell-completion": 'install=bash prints the completion script: eval "$(trainkit -sc install=bash)"',
    "--schema": "print a JSON schema of configs, for editors: trainkit --schema > trainkit.schema.json",
    "--version": "print the version of trainkit",
}
COMMAND_FLAGS = {
    "--json": (
        "bench, check, compare, eval, export, find-lr, inspect, list, params, predict, report, verify-resume, why: "
        "print JSON"
    ),
    "--start LR, --end LR, --steps N": "find-lr: the range and the number of steps (1e-7 to 10 in 100 steps)",
    "resume.allow=[KEY,…]": "resume: accept changes of these keys",
    "--seconds N": "check: duration of the epochs that are measured (9)",
    "--steps N": "bench: number of timed steps per loop (50)",
    "--try": "bench: time other settings too, and say which are faster",
    "--top K, --probabilities": "predict: the K most probable classes; the probability of each class",
    "--flip": "predict: average over an image and its mirror image",
    "device=DEVICE, KEY=VALUE": "predict: values of the config for this machine",
    "--batch-size N": "predict: samples in a batch (val_batch_size of the run)",
    "--output FILE, --format csv|jsonl": "predict: where the rows go (stdout), and their format (csv)",
    "--sort [-]KEY, --reverse, --top N": "compare: the order of the rows (-KEY: descending), and how many",
    "--group-by KEY,…": "compare: fold the runs that have equal values of these keys",
    "--csv, --markdown, --latex": "compare: the format of the table",
    "--plot FILE, --x KEY": "compare: plot the learning curves, or the metric against a number, to a .png or .svg",
    "--format FORMAT": "export: onnx, torch (a program of torch.export) or safetensors (the weights)",
    "--output PATH": "export: a directory or a file (export/FORMAT in the directory of the run)",
    "--checkpoint NAME": "eval, export, predict: best, last or step-N (best)",
    "--with-preprocessing, --overwrite": "export: take raw inputs, such as uint8 images; replace files of others",
    "--all": "why: everything that differs from the defaults",
    "--kills N": "verify-resume: number of kills of the second training (3)",
}
EXAMPLES = {
    "trainkit": "train the toy CNN on handwritten digits, without a download",
    "trainkit model=toy_cnn optim=adam lr=0.001": "choose the optimizer and the learning rate",
    "trainkit experiment=line_fit": "run a recorded experiment",
    "trainkit list optim": "the optimizers, one on each line",
    "trainkit why optim.lr optim=adam": "where a value comes from: files with lines, overrides, interpolations",
    "trainkit -m optim=sgd,adam,adadelta": "three runs, each optimizer with its default learning rate",
    "trainkit compare outputs": "one table over all runs, the best first",
    "trainkit predict last photos/": "the class of each image in a folder, by the newest run",
    "trainkit resume last epochs=40": "resume the newest run, for more epochs than planned",
    "trainkit export last --format onnx": "write the model of the newest run to a file that others can load",
    "trainkit init flowers": "create a project of your own: a model, a data set, configs, tests",
}


def _format_section(title: str, rows: dict[str, str]) -> list[str]:
    """Return a title and aligned rows, each a name and its wrapped description."""
    width = max(map(len, rows))
    indent = " " * (width + 4)
    lines = ["", f"{title}:"]
    for name, description in rows.items():
        first, *more = textwrap.wrap(description, LINE_WIDTH - len(indent)) or [""]
        lines.append(f"  {name:<{width}}  {first}")
        lines += [indent + line for line in more]
    return lines


def command_names() -> list[str]:
    """Return the names of the commands."""
    return [file.stem.replace("_", "-") for file in _command_files()]


def _command_files() -> list[Path]:
    return sorted((Path(__file__).parent / "commands").glob("[a-z]*.py"))


def _commands() -> dict[str, str]:
    rows = {}
    for file in _command_files():
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows[file.stem.replace("_", "-")] = doc.splitlines()[0]
    return rows


def _groups() -> dict[str, str]:
    folders = [CONF, *user_folders()]
    groups = [folder.name for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name != "hydra"]
    return {
        group: ", ".join(sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")}))
        for group in groups
    }


def _keys() -> dict[str, str]:
    """Return the keys of config.yaml that have a comment, with their defaults."""
    comments = key_comments().items()
    return {key + (f"={comment.default}" if comment.default else ""): comment.text for key, comment in comments}

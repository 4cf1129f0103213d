"""The text of `trainkit --help`, read off the commands and the config files themselves."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from trainkit.config.search_path import CONF, user_folders


def text() -> str:
    """Usage, commands, what can be chosen, keys and examples."""
    return "\n".join(
        [
            "usage: trainkit [COMMAND] [KEY=VALUE ...]      no command means train",
            *_section("commands", _commands()),
            *_section("choices (GROUP=NAME; a file of your own in ./conf/GROUP/NAME.yaml is one more)", _groups()),
            *_section("keys (every key of a chosen config too, such as optim.momentum=0.9)", _keys()),
            *_section("flags of commands", OWN_FLAGS),
            *_section("Hydra's flags", FLAGS),
            *_section("examples", EXAMPLES),
        ]
    )


FLAGS = {
    "-m, --multirun": "train each combination of values: -m optim=sgd,adam seed=0,1,2",
    "-c, --cfg job": "show the composed config, train nothing (--resolve: with interpolations filled in)",
    "-cd, --config-dir DIR": "look for configs in DIR as well",
    "-i, --info [WHAT]": "how the config came about: defaults, searchpath, …",
    "-sc, --shell-completion": 'install=bash prints it: eval "$(trainkit -sc install=bash)"',
    "--version": "the version of trainkit",
}
OWN_FLAGS = {
    "--json": "bench, find-lr, inspect, params, verify-resume: the answer as JSON",
    "--start LR, --end LR, --steps N": "find-lr: from 1e-7 to 10 in 100 steps",
    "resume.allow=[KEY,…]": "resume: go on although what these keys say has changed",
    "--steps N": "bench: how many steps of each loop are timed (50)",
    "--kills N": "verify-resume: how often the second training is killed (3)",
}
EXAMPLES = {
    "trainkit": "the toy CNN on handwritten digits, nothing to download",
    "trainkit model=toy_cnn optim=adam lr=0.001": "another optimizer, at a rate of your own",
    "trainkit experiment=line_fit": "a recorded experiment",
    "trainkit -m optim=sgd,adam,adadelta": "three runs, each optimizer at its own rate",
    "trainkit resume last epochs=40": "go on with the newest run, and longer than planned",
}


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    lines = ["", f"{title}:"]
    for name, words in rows.items():
        wrapped = textwrap.wrap(words, 108 - width) or [""]
        lines += [f"  {name:<{width}}  {wrapped[0]}", *(" " * (width + 4) + line for line in wrapped[1:])]
    return lines


def _commands() -> dict[str, str]:
    rows = {}
    for file in sorted((Path(__file__).parent / "commands").glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows[file.stem.replace("_", "-")] = doc.splitlines()[0]
    return rows


def _groups() -> dict[str, str]:
    folders = [CONF, *user_folders()]
    groups = [folder.name for folder in sorted(CONF.iterdir()) if folder.is_dir()]
    return {
        group: ", ".join(sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")}))
        for group in groups
    }


def _keys() -> dict[str, str]:
    """The keys of config.yaml that have a comment, with their defaults."""
    rows: dict[str, str] = {}
    path: list[str] = []
    for line in (CONF / "config.yaml").read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)([\w]+): *(.*?) *(?:# (.*))?$", line)
        if match is None:
            continue
        indent, key, value, comment = match.groups()
        path = [*path[: len(indent) // 2], key]
        if comment:
            rows[".".join(path) + (f"={value}" if value else "")] = comment
    return rows

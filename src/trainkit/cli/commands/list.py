"""List what can be chosen, in one group or in all: name, source and description. * marks the default."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from trainkit.cli import arguments
from trainkit.config.choices import CONFIG_DIR, Choice, find_choices, find_groups
from trainkit.config.defaults import default_choices
from trainkit.config.dotted_choices import DOTTED_GROUPS
from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.core.spelling import did_you_mean
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json, columns

HINT = "write trainkit list [GROUP]"


def run(argv: Sequence[str]) -> int:
    """Print the choices of the group that the command line names, or of all groups. Imports no torch."""
    args = arguments.parse(argv, json=False)
    if arguments.has_hydra_flag(args):
        raise ConfigError("list takes no flag of Hydra except --config-dir", hint=HINT)
    if len(args.overrides) > 1:
        raise ConfigError(f"list takes one group, not {' '.join(args.overrides)}", hint=HINT)
    arguments.report_ignored_configs(args)
    groups = find_groups(args.config_dir)
    if args.overrides:
        [group] = args.overrides
        if group not in groups:
            raise ConfigError(f"{group}: there is no such group", hint=did_you_mean(group, groups, "trainkit list "))
        groups = [group]
    found = {group: find_choices(group, args.config_dir) for group in groups}
    defaults = default_choices()
    if args.json:
        print(as_json({group: [_as_dict(c, defaults.get(group)) for c in found[group]] for group in groups}))
        return 0
    lines = []
    for group in groups:
        lines += [f"{group}:", *_table(found[group], defaults.get(group), args.config_dir), ""]
    lines.append("* the default; choose another with GROUP=NAME")
    if len(groups) > 1 or groups[0] in DOTTED_GROUPS:
        lines.append(f"{', '.join(DOTTED_GROUPS)}: a dotted path is a choice too, such as {_example(groups)}")
    print(printable_lines(lines))
    return 0


def _example(groups: Sequence[str]) -> str:
    return f"{groups[0] if len(groups) == 1 else 'model'}=package.module.Name"


def _table(choices: Sequence[Choice], default: str | None, config_dir: str | None) -> list[str]:
    """Return a line for each choice; on a terminal, no line is longer than the terminal is wide."""
    rows = []
    for choice in choices:
        source = f"{CONFIG_DIR} {config_dir}" if choice.source == CONFIG_DIR else choice.source
        text = f"cannot be read: {choice.fault}" if choice.fault else _first_sentence(choice.description)
        rows.append(["*" if choice.name == default else " ", choice.name, source, text])
    lines = columns(rows)
    width = shutil.get_terminal_size().columns
    cut = sys.stdout.isatty()
    return [f"{line[: width - 1]}…" if cut and len(line) > width else line for line in lines]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text, maxsplit=1)[0]


def _as_dict(choice: Choice, default: str | None) -> dict[str, Any]:
    return {
        "name": choice.name,
        "description": choice.description,
        "source": choice.source,
        "file": display_path(choice.file),
        "default": choice.name == default,
        "fault": choice.fault or None,
    }

"""Say where the value of a key comes from: files with lines, overrides, interpolations; --all: all differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainkit.cli import arguments
from trainkit.config.explain import explain, explain_differences
from trainkit.config.origin import ABSENT
from trainkit.config.trace import trace
from trainkit.core.errors import ConfigError
from trainkit.core.terminal import printable, printable_lines
from trainkit.display.text import as_json, columns

HINT = "write trainkit why KEY [KEY=VALUE ...]; KEY is a key such as optim.lr, or a group such as optim"
MAX_LENGTH = 60  # characters of a value in a table


def run(argv: Sequence[str]) -> int:
    """Print the value of a key and its whole history. Imports no torch.

    Raises:
        ConfigError: the command line is wrong, or the config has errors. Wrong values are explained before.
    """
    args = arguments.parse(argv, json=False, all=False)
    if arguments.has_hydra_flag(args):
        cause = "why takes one config, and none of Hydra's flags"
        raise ConfigError(cause, hint="remove -m, --cfg and other flags of Hydra")
    keys = [word for word in args.overrides if "=" not in word and not word.startswith("~")]
    overrides = [word for word in args.overrides if word not in keys]
    if len(keys) != (not args.all) or "" in keys:
        cause = f"why takes one key, not {len(keys)}" if len(keys) > 1 else "why needs a key"
        raise ConfigError("--all takes no key" if args.all else cause, hint=HINT)
    arguments.report_ignored_configs(args)
    found = trace(overrides, args.config_dir)
    arguments.print_notes(found.notes)
    if args.all:
        answer = explain_differences(found, args.config_dir)
        lines = _difference_lines(answer)
    else:
        answer = explain(found, keys[0])
        lines = list(_answer_lines(answer))
    print(as_json(_without_absent(answer)) if args.json else printable_lines(lines))
    if found.error is not None:
        raise found.error
    return 0


def _answer_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    if "chosen" in answer:
        yield f"{answer['key']}={_text(answer['choice'])}"
        yield from _history_lines(answer["chosen"], "  ")
        if answer.keys() & {"history", "keys"}:
            yield ""
    if "history" in answer:
        yield from _leaf_lines(answer, "")
    elif "keys" in answer:
        yield from _key_table(answer["keys"])


def _leaf_lines(leaf: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Yield the final value of a leaf, its history, and what its interpolations refer to."""
    yield f"{indent}{leaf['key']} = {_text(leaf['value'])}"
    indent += "  "
    yield from _history_lines(leaf["history"], indent)
    if "sweep" in leaf:
        yield f"{indent}with -m: {_text(leaf['sweep']['value'])}  {leaf['sweep']['origin']['text']}"
    for source in leaf.get("sources", ()):
        if "history" in source:
            yield from _leaf_lines(source, indent)
        elif "keys" in source:
            yield f"{indent}{source['key']}:"
            yield from (f"{indent}  {line}" for line in _key_table(source["keys"]))
        elif "variable" in source:
            value = "" if source["value"] is None else f" = {_text(source['value'])}"
            yield f"{indent}environment variable {source['variable']}{value or ' is not set'}"
        elif "resolver" in source:
            yield f"{indent}${{{source['resolver']}:}}: {source['note']}"
        else:
            yield f"{indent}{source['key']}: {source['note']}"


def _history_lines(history: Sequence[Mapping[str, Any]], indent: str) -> list[str]:
    rows = [[_text(event["value"]), printable(event["origin"]["text"])] for event in history]
    return [f"{indent}{line}" for line in columns(rows)]


def _key_table(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for leaf in keys:
        value = _text(leaf["value"])
        if "written" in leaf:
            value = f"{value}, from {_text(leaf['written'])}"
        rows.append([leaf["key"], value, printable(leaf["history"][-1]["origin"]["text"])])
    return columns(rows)


def _difference_lines(answer: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in answer["differences"]:
        origin = row["origin"]["text"] if row["origin"] else ""
        rows.append([row["key"], _text(row["value"]), f"instead of {_text(row['default'])}", printable(origin)])
    note = f"compared with {answer['compared_with']}"
    return [*(columns(rows) if rows else ["nothing differs"]), "", note]


def _text(value: Any) -> str:
    """Return a value as it is written in YAML, in one line."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else str(value)
    text = printable(text.replace("\n", " "))
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}…"


def _without_absent(node: Any) -> Any:
    """Return plain containers in which a removed value is the key `removed`."""
    if isinstance(node, Mapping):
        plain = {key: _without_absent(item) for key, item in node.items() if item is not ABSENT}
        return plain | ({"removed": True} if any(item is ABSENT for item in node.values()) else {})
    return [_without_absent(item) for item in node] if isinstance(node, list) else node

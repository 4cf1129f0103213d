"""Each parameter, its group, the options in force and the rule that decided each; trains nothing."""

from __future__ import annotations

from collections.abc import Sequence

from trainkit.cli import arguments
from trainkit.display import text as tables


def run(argv: Sequence[str]) -> int:
    """Build what a run would build, and show its parameters: as a table, or with `--json` as objects."""
    args, composed = arguments.parse_for_one_config(argv, json=False)
    from trainkit.build import session as build

    with arguments.only_answer_on_stdout(args):
        params = build.build_session(composed.settings).params
    print(tables.as_json(params) if args.json else "\n".join(tables.params(params)))
    return 0

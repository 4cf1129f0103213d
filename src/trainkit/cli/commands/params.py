"""Each parameter, its group, the options in force and the rule that decided each; trains nothing."""

from __future__ import annotations

from collections.abc import Sequence

from trainkit.cli import arguments as flags
from trainkit.display import text as tables


def run(argv: Sequence[str]) -> int:
    """Build what a run would build, and show its parameters: as a table, or with `--json` as objects."""
    args, composed = flags.one_config(argv, json=False)
    from trainkit.build import session as build

    with flags.answer_alone(args):
        params = build.build_session(composed.config).params
    print(tables.as_json(params) if args.json else "\n".join(tables.params(params)))
    return 0

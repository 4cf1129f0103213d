"""Each parameter, its group, the options in force and the rule that decided each; trains nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trainkit import display, flags


def run(argv: Sequence[str]) -> int:
    """Build what a run would build, and show its parameters: as a table, or with `--json` as objects."""
    args, composed = flags.one_config(argv, json=False)
    from trainkit import build

    params = build.training(composed.config).params
    print(json.dumps(params, indent=2, default=str) if args.json else "\n".join(display.params(params)))
    return 0

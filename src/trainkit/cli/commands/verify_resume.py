"""Train once without a break and once with kills and resumes; compare the hashes of the final states."""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.cli import arguments
from trainkit.core.errors import ConfigError
from trainkit.core.paths import claim_directory, display_path
from trainkit.core.terminal import printable_lines
from trainkit.display.text import as_json


def run(argv: Sequence[str]) -> int:
    """Exit with 0 only if both trainings end with the same bits; keep the runs if they differ."""
    args, composed = arguments.parse_for_one_config(argv, json=False, kills=3)
    if args.kills < 1:
        raise ConfigError(f"--kills {args.kills}: at least one kill is needed", hint="write --kills 3")
    if composed.settings.checkpoint is None:
        raise ConfigError("checkpoint=off: there is no checkpoint to resume from", hint="leave out checkpoint=off")
    if composed.settings.max_minutes is not None:
        cause = "max_minutes: two trainings by the clock end at different steps"
        raise ConfigError(cause, hint="write max_minutes=off and steps=N")
    if args.config_dir:
        raise ConfigError(
            "--config-dir is not supported by verify-resume",
            hint="copy the configs into ./conf and leave out --config-dir",
        )
    from trainkit.diagnostics.verify_resume import verify_resume

    directory = claim_directory(Path("outputs/verify-resume") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}")
    overrides = [text for text in args.overrides if not text.startswith(("hydra.run.dir=", "progress="))]
    result = verify_resume(overrides, args.kills, directory, lambda line: print(line, file=sys.stderr))
    if "failed" in result:
        return int(result["failed"]) % 256
    print(as_json(result) if args.json else printable_lines(result_lines(result, directory)))
    if result["equal"]:
        shutil.rmtree(directory)
    return 0 if result["equal"] else 1


def result_lines(result: Mapping[str, Any], directory: Path) -> list[str]:
    """Return both hashes and whether they are equal.

    Args:
        result: what `verify_resume` returns.
        directory: holds both runs.
    """
    steps = result["steps"]
    kills = f"killed at step{'s' * (len(steps) != 1)} {', '.join(map(str, steps))}"
    lines = [f"straight  {result['straight']}", f"resumed   {result['resumed']}  ({kills})"]
    if result["equal"]:
        return [*lines, "equal: model, optimizer, schedulers, averages, RNG states and history have the same bits"]
    return [*lines, f"DIFFERENT: compare the runs in {display_path(directory)}; on a GPU write deterministic=true"]

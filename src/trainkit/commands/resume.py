"""Go on with a run where it stopped, to the same bits; RUN is its directory, or `last`."""

from __future__ import annotations

from collections.abc import Sequence

from trainkit import display, flags
from trainkit.config import recomposed
from trainkit.errors import ConfigError
from trainkit.run import Run, find


def run(argv: Sequence[str]) -> int:
    """Check what is asked for, restore the newest checkpoint that is whole, train on."""
    args = flags.parse(argv)
    if args.multirun or args.cfg or args.info or args.hydra_help or args.shell_completion or not args.overrides:
        raise ConfigError("resume takes a run and overrides", mend="write trainkit resume RUN [KEY=VALUE ...], or last")
    name, *overrides = args.overrides
    before = Run.load(find(name))
    if before.info.get("status") == "completed" and not overrides:
        print("\n".join(display.finished(before)))
        return 0
    recomposed(before.config, overrides)  # what is wrong there is told before torch is imported
    from trainkit.resuming import resume

    print("\n".join(display.result(resume(before, overrides))))
    return 0
